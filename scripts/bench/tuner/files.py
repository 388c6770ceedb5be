"""What CondFT costs before and after training: its start, its files, and the merged model."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from condft import CondFTConfig
from scripts.bench.race import medians, race, ratio
from scripts.bench.tuner.models import FRACTION, Adapted, batch, lora_config, moe, quarter_of_experts, smollm2

__all__ = ["MERGED_WORK", "files", "merged", "start"]

TOKENS = 512
MERGED_WORK: dict[str, Callable[[], Any]] = {
    "smollm2 float32": smollm2,
    "smollm2 bfloat16": lambda: smollm2(torch.bfloat16),
    "olmoe bfloat16": lambda: moe("olmoe", "grouped_mm", torch.bfloat16),
}


@contextmanager
def kept_reports() -> Iterator[None]:
    """An empty folder as the user's cache of reports."""
    before = os.environ.get("CONDFT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONDFT_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["CONDFT_CACHE"]
            if before is not None:
                os.environ["CONDFT_CACHE"] = before


def start(repeats: int, tick: Callable[[], Any]) -> dict[str, Any]:
    """`get_peft_model` on fresh copies of SmolLM2, against LoRA; the warm-up round makes the report."""
    base = smollm2()
    fresh: dict[str, nn.Module] = {}
    configs = {"condft": lambda: CondFTConfig(trainable_fraction=FRACTION), "lora": lora_config}

    def renew(name: str) -> None:
        fresh[name] = copy.deepcopy(base)

    contestants = {name: lambda name=name: get_peft_model(fresh[name], configs[name]()) for name in configs}
    with kept_reports():
        runs = race(contestants, rounds=repeats, before={name: partial(renew, name) for name in configs}, tick=tick)
    seconds = medians(runs)
    return {
        "work": "smollm2",
        "seconds": seconds,
        "seconds_beyond_lora": seconds["condft"]["seconds"] - seconds["lora"]["seconds"],
        "runs": runs,
    }


def files(units: Sequence[str], repeats: int, tick: Callable[[], Any]) -> dict[str, Any]:
    """`save_pretrained` and `PeftModel.from_pretrained` against safetensors on the same tensors."""
    model: Any = Adapted.by_condft(smollm2(), units).model
    tensors = get_peft_model_state_dict(model)
    bases: list[Any] = [smollm2()]
    loaded: list[Any] = []

    def bare() -> None:
        # from_pretrained wraps the base in place, so the last round's base is unwrapped for the next one.
        bases.extend(adapted.unload() for adapted in loaded)
        loaded.clear()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contestants: dict[str, Callable[[], Any]] = {
            "save": lambda: model.save_pretrained(folder / "adapter"),
            "load": lambda: loaded.append(PeftModel.from_pretrained(bases.pop(), folder / "adapter")),
            "safetensors_write": lambda: save_file(tensors, folder / "same.safetensors"),
            "safetensors_read": lambda: {k: v.clone() for k, v in load_file(folder / "same.safetensors").items()},
        }
        model.save_pretrained(folder / "adapter")
        runs = race(contestants, rounds=repeats, before={"load": bare}, tick=tick)
        size = (folder / "same.safetensors").stat().st_size
    return {
        "work": "smollm2",
        "bytes": size,
        "seconds": medians(runs),
        "save_against_write": ratio(runs, "save", "safetensors_write"),
        "load_against_write": ratio(runs, "load", "safetensors_write"),
        "load_against_read": ratio(runs, "load", "safetensors_read"),
        "runs": runs,
    }


def merged(work: str, units: Sequence[str] | None, repeats: int, tick: Callable[[], Any]) -> dict[str, Any]:
    """Forward of the base and of the merged model, and whether the merged one's logits are the adapter's, to the bit.

    Args:
        work: One of `MERGED_WORK`.
        units: What trains for three steps first; None for a quarter of the experts.
    """
    base = MERGED_WORK[work]().eval()
    ids = batch(base, TOKENS)
    adapted = Adapted.by_condft(base, units or quarter_of_experts(base))
    for group in adapted.optimizer.param_groups:
        group["lr"] = 1e-3  # far enough that bf16 sees it
    for _ in range(3):
        adapted.step(ids)
    model: Any = adapted.model.eval()

    def logits(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = of(input_ids=ids).logits
        return found

    expected = logits(model)
    plain = model.merge_and_unload()
    runs = race({"merged": lambda: logits(plain), "base": lambda: logits(base)}, rounds=repeats, tick=tick)
    return {
        "work": work,
        "tokens": TOKENS,
        "seconds": medians(runs),
        "against_base": ratio(runs, "merged", "base"),
        "logits_are_the_adapters": torch.equal(logits(plain), expected),
        "logits_moved": not torch.equal(expected, logits(base)),
        "same_modules_and_tensors": layout(plain) == layout(base),
        "runs": runs,
    }


def layout(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module's class and every tensor's name, shape, strides and dtype: all that its speed depends on."""
    modules: list[tuple[Any, ...]] = [(name, type(module)) for name, module in model.named_modules()]
    return modules + [(n, t.shape, t.stride(), t.dtype) for n, t in model.state_dict().items()]
