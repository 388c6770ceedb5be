"""Training steps on the device: CondFT against the same weights unfrozen by hand and against LoRA; `offload_base`.

The model is built from a config: nothing is downloaded, and time and memory do not depend on the values.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from condft import CondFTConfig, analyze, select_units
from scripts.bench.gpu.part import Place, Result, peak_bytes, synchronized, timed
from scripts.bench.race import medians, race, ratio
from scripts.bench.tuner.models import Adapted, UnfrozenByHand, batch

__all__ = ["build_llama", "offload_base", "training_step"]

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
FRACTION = 0.1  # of the layers' parameters
TOKENS = {False: 4096, True: 32}  # by Place.small
ROUNDS = {False: 11, True: 3}


def build_llama(place: Place) -> Any:
    """A random Llama of 1.1 billion parameters (or a tiny one) on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if place.small else LLAMA_1B), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    # built where it runs: 1.1 billion fp32 numbers are slow to draw on a CPU
    with torch.device(place.device):
        return LlamaForCausalLM(config).to(place.dtype)


def training_step(place: Place) -> Result:
    """Time and peak memory of a step of each contestant, and seconds of the analysis that selects the weights."""
    base = build_llama(place)
    names = [name for name, _ in base.named_parameters() if ".layers." in name and "norm" not in name]
    analysis, report = timed(place, lambda: analyze(base, names=names, progress=False, cache=False), repeats=1)
    units = select_units(report, trainable_fraction=FRACTION).names
    makers: dict[str, Callable[[Any], Adapted]] = {
        "condft": lambda model: Adapted.by_condft(model, units),
        "unfrozen": lambda model: UnfrozenByHand(model, units),
        "lora": Adapted.by_lora,
    }
    ids = batch(base, TOKENS[place.small]).to(place.device)
    peaks = {name: _peak_of_steps(place, make, ids) for name, make in makers.items()}
    contestants = {name: make(base) for name, make in makers.items()}
    losses = {name: [contestant.step(ids) for _ in range(2)] for name, contestant in contestants.items()}
    steps = {name: partial(synchronized, place, partial(each.step, ids)) for name, each in contestants.items()}
    runs = race(steps, rounds=ROUNDS[place.small], seconds=60.0)
    problems = []
    if losses["condft"] != losses["unfrozen"]:
        problems.append(f"the losses of condft and unfrozen differ: {losses['condft']} and {losses['unfrozen']}")
    return {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "tokens": ids.numel(),
        "selected_weights": len(units),
        "seconds_analysis": analysis,
        "step": medians(runs),
        "against_unfrozen": ratio(runs, "condft", "unfrozen"),
        "against_lora": ratio(runs, "condft", "lora"),
        "peak_bytes": peaks,
        "losses": losses,
        "problems": problems,
    }


def _peak_of_steps(place: Place, make: Callable[[Any], Adapted], ids: Tensor) -> int:
    """Of two steps: the second one has the optimizer's state from its start."""
    base = build_llama(place)
    contestant = make(base)
    del base  # a contestant trains a copy
    gc.collect()

    def two_steps() -> None:
        for _ in range(2):
            contestant.step(ids)

    return peak_bytes(place, two_steps)


def offload_base(place: Place) -> Result:
    """Memory, time and logits with the originals of selected weights on the CPU, against all of them on the device."""
    base = build_llama(place)
    names = [name for name, _ in base.named_parameters() if "mlp" in name][: 2 if place.small else 24]
    ids = batch(base, TOKENS[place.small]).to(place.device)
    with torch.no_grad():
        expected = base(input_ids=ids[:1]).logits
    del base
    found: dict[str, Result] = {}
    logits: dict[str, Tensor] = {}
    problems = []
    for label, offload in (("on_device", False), ("offloaded", True)):
        config = CondFTConfig(target_units=names, offload_base=offload)
        model: Any = get_peft_model(build_llama(place), config)
        gc.collect()
        adapted = Adapted(model)
        found[label] = {
            "peak_bytes": peak_bytes(place, partial(adapted.step, ids)),
            "seconds_step": timed(place, partial(adapted.step, ids))[0],
        }
        with torch.no_grad(), model.disable_adapter():
            if not torch.equal(model(input_ids=ids[:1]).logits, expected):
                problems.append(f"{label}: without the adapter the model is not the base")
        with torch.no_grad():
            logits[label] = model.eval()(input_ids=ids[:1]).logits.cpu()
        del model, adapted
    if not torch.equal(logits["on_device"], logits["offloaded"]):
        problems.append("the logits after training differ")
    saved = found["on_device"]["peak_bytes"] - found["offloaded"]["peak_bytes"]
    if place.device == "cuda" and saved <= 0:
        problems.append(f"no memory was saved: {saved} bytes")
    return {"weights": len(names), **found, "bytes_saved": saved, "problems": problems}
