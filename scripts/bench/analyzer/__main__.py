"""Times the analyzer beside PEFT's KappaTuneSelector: same weights, same threads, same run, turn and turn about.

    python -m scripts.bench.analyzer                 # everything, into docs/results/analyzer.json; half an hour
    python -m scripts.bench.analyzer --only smollm2  # a part; the others of an existing file stay as they are

Medians over `--repeats`. Speed-ups are ratios within this run. The selector computes κ of Linear weights and, for
fused experts, the mean κ of the stack; ours is timed for the same κ (`basic`), again with all measures, and from the
cache. Beside the races: the error of κ over planted spectra and over SmolLM2's layer weights, batched calls against
threads on the CPU, the distance to what the routes must move and multiply,
memory of a streamed checkpoint, two ranks, and how cost grows. Needs models/smollm2-135m-instruct
(scripts/data/get_models.py) for the first row and its error, and 4 GB of disk for the streamed checkpoint.
"""

import gc
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import KappaTuneSelector
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from condft.analysis.analyze import analyze
from condft.files.atomic import write_json
from condft.runtime.console import console
from condft.spectra import spectral_facts
from scripts.bench.analyzer.batches import batches_against_threads
from scripts.bench.analyzer.limit import distance_to_limit, machine_rates
from scripts.bench.analyzer.models import error_over_model
from scripts.bench.analyzer.processes import shared_by_two
from scripts.bench.analyzer.scaling import extrapolate, plot_scaling, scaling
from scripts.bench.analyzer.streaming import streaming
from scripts.bench.results import arguments_of, earlier_results, made_by

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

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, generator=generator) * 0.02)


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
    model = AutoModelForCausalLM.from_pretrained("models/smollm2-135m-instruct", use_safetensors=True)
    return model.get_submodule("model.layers")


WORK: dict[str, Callable[[], nn.Module]] = {
    "smollm2": smollm2,
    "4096x4096": lambda: linears({"square": (4096, 4096)}),
    "14336x4096": lambda: linears({"tall": (14336, 4096)}),
    "llama-8b layer": lambda: linears(LLAMA_8B_LAYER),
    "128 experts": lambda: nn.ModuleDict({"experts": Experts()}),
}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def selector_kappas(model: nn.Module) -> dict[str, float]:
    selector = KappaTuneSelector(model, show_progress=False)
    selector.get_best_targets(num_modules=1)
    selector.get_best_target_parameters(num_modules=1)
    linear, stacks = selector._condition_numbers or {}, selector._parameter_condition_numbers or {}
    return {f"{name}.weight": kappa for name, kappa in linear.items()} | stacks


def contestants(name: str, model: nn.Module, cache: str) -> dict[str, Callable[[], Any]]:
    """What is timed, in this order; `cache` is an empty folder."""
    fresh = partial(analyze, model, progress=False, cache=False)
    kept = partial(analyze, model, progress=False, cache=cache)
    calls = {
        "selector": partial(selector_kappas, model),
        "basic": fresh,
        "all": partial(fresh, measures="all"),
        "first_start": kept,
        "second_start": kept,
    }
    return calls | ({"keep_lowest": partial(fresh, keep_lowest=KEEP_LOWEST[name])} if name in KEEP_LOWEST else {})


def race(name: str, repeats: int) -> dict[str, Any]:
    """All, turn and turn about, so that a slow spell of the machine hits all."""
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
    return {
        "work": name,
        "seconds": medians,
        "runs": dict(seconds),
        "speedup": medians["selector"] / medians["basic"],
        "speedup_all": medians["selector"] / medians["all"],
        "target": TARGETS[name],
        "second_start_share": medians["second_start"] / medians["first_start"],
        **({"speedup_keep_lowest": medians["selector"] / medians["keep_lowest"]} if name in KEEP_LOWEST else {}),
        "same_order": sorted(shared, key=ours.__getitem__) == sorted(shared, key=theirs.__getitem__)
        if shared
        else None,
        "methods": sorted({row.method for row in report.rows}),
    }


def error_grid() -> list[dict[str, Any]]:
    """Largest relative error of κ against NumPy's fp64 SVD over planted spectra as stored; lower bounds apart."""
    rows = []
    for shape in ((192, 576), (576, 576), (1024, 1024), (1536, 576), (600, 560), (8192, 128)):
        for decade in range(0, 13, 2):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                errors, below, methods = [], [], set()
                for seed, spacing in enumerate((np.geomspace, np.linspace)):
                    matrix = planted(shape, spacing(10.0**decade, 1.0, min(shape)), seed).to(dtype)
                    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
                    facts = spectral_facts(matrix)
                    if math.isfinite(facts.condition_number):
                        off = facts.condition_number * values[-1] / values[0] - 1
                        (below if facts.is_lower_bound else errors).append(-off if facts.is_lower_bound else abs(off))
                    methods.add(facts.method)
                name = str(dtype).removeprefix("torch.")
                row = {"shape": shape, "planted_kappa": 10.0**decade, "dtype": name}
                # A row without either: both numerically rank-deficient, κ past 1 / (max(m, n) eps).
                row |= {"error": float(max(errors)) if errors else None, "methods": sorted(methods)}
                # How far the lower bounds lie under the truth; one above it would be negative.
                rows.append(row | {"bounds_below": [float(off) for off in below]})
    return rows


def planted(shape: tuple[int, int], spectrum: np.ndarray, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    n = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], n)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], n)))[0]
    return torch.from_numpy(left * spectrum @ right.T)


def limits(repeats: int) -> list[dict[str, Any]]:
    """Each route's time over that of its own passes and flops at this machine's rates."""
    rates = machine_rates()
    rows = []
    for shape in ((4096, 4096), (14336, 4096), (4096, 1024), (1024, 1024)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        for measures in ("basic", "all"):
            work = partial(spectral_facts, matrix, measures=measures)
            seconds = statistics.median(timed(work)[0] for _ in range(repeats))
            found = distance_to_limit(work, matrix.numel() // 64, rates, seconds)
            rows.append({"shape": shape, "measures": measures, "method": work().method, **found, **rates})
    return rows


def grown(repeats: int) -> dict[str, Any]:
    found = scaling(repeats)
    plot_scaling(found, Path("docs/results/analyzer_scaling.png"))
    return {**found, "extrapolated": extrapolate(found)}


def show(results: dict[str, Any]) -> None:
    table = Table(title="condft.analyze beside KappaTuneSelector (medians, seconds)", title_justify="left")
    for heading in ("work", "selector", "κ", "speed-up", "goal", "all measures", "keep_lowest", "second start"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for row in results.get("races", {}).values():
        s = row["seconds"]
        kept = f"{row['speedup_keep_lowest']:.1f}x" if "speedup_keep_lowest" in row else ""
        second = f"{s['second_start']:.3f} s, {row['second_start_share']:.1%}"
        figures = (f"{s['selector']:.2f}", f"{s['basic']:.2f}", f"{row['speedup']:.1f}x", f"{row['target']:.0f}x")
        table.add_row(row["work"], *figures, f"{row['speedup_all']:.1f}x", kept, second)
    console().print(table)
    for row in results.get("limits", []):
        print(f"{row['shape']!s:>14} {row['measures']:5} {row['method']:8} {row['ratio']:.2f} of the limit (goal 2)")
    for part in ("error_smollm2", "batches", "streamed", "ranks", "scaling"):
        if part in results:
            print(part, json.dumps(results[part], indent=1))
    for row in results.get("error", []):
        routes = ", ".join(row["methods"])
        error = "inf, or a lower bound" if row["error"] is None else f"error {row['error']:.1e}"
        print(f"{row['shape']!s:>14} {row['dtype']} κ {row['planted_kappa']:.0e} {error} by {routes}")


def main() -> None:
    parts: dict[str, Callable[[int], Any]] = {
        "error": lambda repeats: error_grid(),
        "error_smollm2": lambda repeats: error_over_model(smollm2()),
        "batches": batches_against_threads,
        "limits": limits,
        "streamed": lambda repeats: streaming(Path("runs/bench_streamed_checkpoint")),
        "ranks": lambda repeats: shared_by_two(linears(LLAMA_8B_LAYER)),
        "scaling": grown,
    }
    arguments = arguments_of(__doc__, [*WORK, *parts], "docs/results/analyzer.json", repeats=3)
    results = earlier_results(arguments)
    results.setdefault("races", {})
    for name in arguments.only or [*WORK, *parts]:
        if name in WORK:
            results["races"][name] = race(name, arguments.repeats)
        else:
            results[name] = parts[name](arguments.repeats)
        results["made_by"][name] = made_by("scripts/bench/analyzer/__main__.py", arguments.repeats)
        write_json(arguments.out, results)
    show(results)


if __name__ == "__main__":
    main()
