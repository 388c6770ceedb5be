"""`condft.analyze` against PEFT's KappaTuneSelector: the same weights, the same threads, in turns in one process.

The selector computes κ of Linear weights and, for fused experts, the mean κ of the stack. Ours is timed for the same κ
(`basic`), again with all measures, and from the cache.
"""

import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.helpers import KappaTuneSelector
from torch import nn
from transformers import AutoModelForCausalLM

from condft.analysis.analyze import analyze

__all__ = ["LLAMA_8B_LAYER", "WORK", "linears", "race", "smollm2", "timed"]

LLAMA_8B_LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
EXPERTS = (128, 768, 2048)
TARGETS = {"smollm2": 4.0, "4096x4096": 8.0, "14336x4096": 6.0, "llama-8b layer": 7.0, "128 experts": 4.0}
KEEP_LOWEST = {"llama-8b layer": 2}  # of its seven; goal 10x


class Experts(nn.Module):
    """A fused stack under a name that the selector looks for."""

    def __init__(self, shape: tuple[int, int, int] = EXPERTS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.down_proj = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)


def linears(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Gaussian weights of standard deviation 0.02, as models are initialized; seeded by position."""
    layers = nn.ModuleDict()
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        layer = nn.Linear(columns, rows, bias=False)
        generator = torch.Generator().manual_seed(index)
        layer.weight = nn.Parameter(torch.randn(rows, columns, generator=generator) * 0.02)
        layers[name] = layer
    return layers


def smollm2() -> nn.Module:
    """The layers of the real model; from models/, where `scripts.data.get_models` puts it."""
    model = AutoModelForCausalLM.from_pretrained("models/smollm2-135m-instruct", use_safetensors=True)
    layers: nn.Module = model.get_submodule("model.layers")
    return layers


WORK: dict[str, Callable[[], nn.Module]] = {
    "smollm2": smollm2,
    "4096x4096": lambda: linears({"square": (4096, 4096)}),
    "14336x4096": lambda: linears({"tall": (14336, 4096)}),
    "llama-8b layer": lambda: linears(LLAMA_8B_LAYER),
    "128 experts": lambda: nn.ModuleDict({"experts": Experts()}),
}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds by the clock, and the result."""
    gc.collect()  # garbage of an earlier contestant is not collected on this one's time
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def selector_kappas(model: nn.Module) -> dict[str, float]:
    """Weight or stack -> κ, as PEFT's selector computes it."""
    selector = KappaTuneSelector(model, show_progress=False)
    selector.get_best_targets(num_modules=1)
    selector.get_best_target_parameters(num_modules=1)
    linear, stacks = selector._condition_numbers or {}, selector._parameter_condition_numbers or {}
    return {f"{name}.weight": kappa for name, kappa in linear.items()} | stacks


def contestants(name: str, model: nn.Module, cache: str) -> dict[str, Callable[[], Any]]:
    """What is timed, in this order; `cache` is an empty folder, so that only the second start finds a report."""
    fresh = partial(analyze, model, progress=False, cache=False)
    kept = partial(analyze, model, progress=False, cache=cache)
    calls: dict[str, Callable[[], Any]] = {
        "selector": partial(selector_kappas, model),
        "basic": fresh,
        "all": partial(fresh, measures="all"),
        "first_start": kept,
        "second_start": kept,
    }
    return calls | ({"keep_lowest": partial(fresh, keep_lowest=KEEP_LOWEST[name])} if name in KEEP_LOWEST else {})


def race(name: str, repeats: int) -> dict[str, Any]:
    """All contestants in turns, so that a slow spell of the machine slows all of them.

    Args:
        name: One of `WORK`.
        repeats: Rounds; speed-ups are ratios of the medians over them.
    """
    model = WORK[name]()
    seconds: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, Any] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for contestant, function in contestants(name, model, cache).items():
                taken, answers[contestant] = timed(function)
                seconds[contestant].append(taken)
    theirs, report = answers["selector"], answers["basic"]
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    ours = {row.name: row.condition_number for row in report.rows}  # a stack's mean has no counterpart here
    shared = sorted(ours.keys() & theirs.keys())
    found: dict[str, Any] = {
        "work": name,
        "seconds": medians,
        "runs": dict(seconds),
        "speedup": medians["selector"] / medians["basic"],
        "speedup_all": medians["selector"] / medians["all"],
        "target": TARGETS.get(name),
        "second_start_share": medians["second_start"] / medians["first_start"],
    }
    if name in KEEP_LOWEST:
        found["speedup_keep_lowest"] = medians["selector"] / medians["keep_lowest"]
    same = sorted(shared, key=ours.__getitem__) == sorted(shared, key=theirs.__getitem__)
    found["same_order"] = same if shared else None
    found["methods"] = sorted({row.method for row in report.rows})
    return found
