r"""Fisher information of units: how far the model's output distribution moves when one of their entries moves.

It is the only score here that the weights alone do not give. It still needs no data: text is sampled from the model.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from condft.report import SpectralReport
from condft.retention.sampling import sample_from_base
from condft.runtime.model_mode import evaluating, flags_kept
from condft.tuner.layers.dequantize import is_quantized
from condft.tuner.layers.slices import Slices
from condft.tuner.targets import Target, Targets
from condft.weights.shards import is_dtensor

__all__ = ["add_fisher_information"]

_SEQUENCES, _TOKENS, _SEED = 16, 64, 0  # of the text that is sampled if none is given


def add_fisher_information(
    report: SpectralReport,
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    names: Collection[str] | None = None,
    progress: bool = True,
) -> SpectralReport:
    r"""Adds the Fisher information of its units to a report: to second order, what training a unit costs the model.

    A small update $\Delta$ of a unit moves the model's distribution by $\mathrm{KL} \approx \frac12 \Delta^\top F
    \Delta$ nats per token (Martens, JMLR 21, 2020). Here $F = E[g g^\top]$ is the Fisher information per
    token, and g is the gradient of the log-probability of a sequence, divided by the square root of its length. The
    expectation is over text sampled from the model itself. One gradient per sequence is enough: the gradients of
    different tokens are martingale differences, so their products vanish in expectation.

    The reported figure is the mean of F's diagonal over the unit's entries. Adam moves every entry by about the
    learning rate, so units with equal figures cost about the same per trained entry. Each sequence takes one backward
    pass. Only one parameter's gradient is in memory at a time, next to the activations.

    >>> report = add_fisher_information(report, base, token_ids, progress=False)
    >>> row = report["model.layers.0.mlp.up_proj.weight"]
    >>> row.fisher_information > 0
    True

    Such a report can rank the units:

    >>> from condft import select_units
    >>> len(select_units(report, num_tensors=3, score="fisher_information").names)
    3

    Args:
        report: Of the same model.
        model: A causal LM, or a model that holds one and takes `input_ids` alone. Its adapters are off meanwhile.
            Its modes, `requires_grad` and gradients are left as they were.
        tokens: Text, of shape `(num_sequences, length)` and dtype long. The first token of each sequence is given, the
            others are scored. It should be sampled from the model (`condft.retention.sample_from_base`): on other
            text the figure is not the Fisher information. None samples 16 sequences of 64 tokens.
        names: Units; by default all of the report that CondFT can train.
        progress: Show a progress bar.

    Returns:
        The report, with `fisher_information` in these rows. Units that text does not pass through (those of a speech
        encoder, for example) have None. A fused expert that no token was routed to has 0.

    Raises:
        KeyError: A name without a row.
        ValueError: A unit without a gradient (quantized, sharded, on the meta device, or computed by a
            parametrization), a merged adapter, a model that gives no logits, gradients that are not finite, or
            sequences of fewer than 2 tokens.
    """
    targets = Targets(model)
    found = {name: targets.find(name) for name in (names if names is not None else [row.name for row in report.rows])}
    units = {name: target for name, target in found.items() if isinstance(target, Target)}
    refused = [] if names is None else sorted(found.keys() - units.keys())
    if refused:
        report[refused[0]]  # a KeyError where the report has no such row
        raise ValueError(f"{refused[0]!r} cannot be trained: {found[refused[0]] or 'the model has no such parameter'}")
    parameters = _parameters(model, targets, units)
    with _base_alone(model):
        if tokens is None:
            tokens = _sampled_text(model, progress=progress)
        traces = _traces(model, parameters, tokens, progress=progress)
    rows = tuple(
        replace(row, fisher_information=traces[row.name] / row.num_parameters) if row.name in traces else row
        for row in report.rows
    )
    return replace(report, rows=rows)


def _sampled_text(model: nn.Module, *, progress: bool) -> Tensor:
    start = getattr(model, "generation_config", None)
    if start is None:
        raise ValueError(
            f"a {type(model).__name__} does not say which token its text begins with (it has no generation_config): "
            "hand over tokens, for example from condft.retention.sample_from_base"
        )
    return sample_from_base(model, start, num_sequences=_SEQUENCES, num_tokens=_TOKENS, seed=_SEED, progress=progress)


_Units = dict[nn.Parameter, dict[str, Slices | None]]


def _parameters(model: nn.Module, targets: Targets, units: dict[str, Target]) -> _Units:
    """Parameter -> its units' names and slices."""
    found: _Units = {}
    for name, target in units.items():
        parameter = attrgetter(target.parameter)(targets.module(target.path))
        reason = _why_no_gradient(targets.module(target.path), parameter)
        if reason is not None:
            raise ValueError(
                f"the Fisher information of {name!r} needs its gradient, and there is none: {reason}. Measure it on "
                "a whole, unquantized copy of the model, and hand the selection over as target_units."
            )
        found.setdefault(parameter, {})[name] = target.slices
    if not found:
        raise ValueError("the report has no unit that CondFT can train in this model")
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(f"{len(away)} weights are on the meta device, the first is {away[0]!r}: load them first")
    return found


def _why_no_gradient(module: nn.Module, parameter: Any) -> str | None:
    if is_quantized(module):
        return "it is quantized"
    if is_dtensor(parameter):
        return "it is sharded"
    return None if isinstance(parameter, nn.Parameter) else "it is no plain parameter"


def _traces(model: Any, parameters: _Units, tokens: Tensor, *, progress: bool) -> dict[str, float]:
    """Name -> trace of F, for the units that the text reaches."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: needs at least one sequence of at least 2")
    traces: dict[str, Tensor] = {}  # tensors on the gradients' device: a Python number would wait for the device
    # The mean over sequences, and 1/length of the square of a gradient that is divided by the length's square root.
    scale = 1.0 / tokens.shape[0] / (tokens.shape[1] - 1)

    def collect(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None  # freed at once: together they are as large as the model
        assert gradient is not None
        for name, slices in parameters[parameter].items():
            part = gradient if slices is None else slices.take(gradient)
            # In fp32: in fp16 the squares of small gradients would be zero.
            square = torch.linalg.vector_norm(part, dtype=torch.float32).square() * scale
            traces[name] = traces[name] + square if name in traces else square

    with _gradients_of(model, parameters, collect), evaluating(model) as device:
        # One sequence at a time: each gradient is squared before they are added, so a batch's sum would not do.
        bar = tqdm(tokens.split(1), desc="Fisher information", unit="sequence", disable=not progress, leave=False)
        for sequence in bar:
            inputs = sequence.to(device)
            logits = getattr(model(input_ids=inputs, use_cache=False), "logits", None)
            if logits is None or logits.shape[:2] != inputs.shape:
                raise ValueError(
                    f"{type(model).__name__} gives no next-token logits for input_ids: Fisher information is that of "
                    "a causal LM's text"
                )
            # A sum: g is the gradient of the whole sequence's log-probability. `scale` divides by the length.
            F.cross_entropy(logits[0, :-1].float(), inputs[0, 1:], reduction="sum").backward()
    found = {name: trace.item() for name, trace in traces.items()}
    damaged = sorted(name for name, trace in found.items() if not math.isfinite(trace))
    if damaged:
        raise ValueError(f"the gradients of {len(damaged)} units are not finite, the first is {damaged[0]!r}")
    return found


@contextmanager
def _gradients_of(
    model: nn.Module, parameters: Collection[nn.Parameter], collect: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Within, a backward pass calls `collect` with each of these parameters, as soon as its gradient is there."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None  # else the backward would add to it
            parameter.requires_grad_(parameter in parameters)
        # After requires_grad_: torch registers no such hook on a frozen parameter.
        handles = [parameter.register_post_accumulate_grad_hook(collect) for parameter in parameters]
        with torch.enable_grad():  # the caller may have turned it off
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Within, all adapters are off.

    Raises:
        ValueError: One is merged.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("an adapter is merged, so the base cannot be measured: call unmerge_adapter() first")
    on = [layer for layer in layers if not layer.disable_adapters]  # only these are switched on again
    # PEFT's enable_adapters also changes requires_grad.
    with flags_kept(model):
        try:
            for layer in on:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in on:
                layer.enable_adapters(True)
