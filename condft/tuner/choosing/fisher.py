r"""Fisher information of units: how far the model's own distribution moves when one of their entries does.

The one score here that is not read off the weight alone. It still needs no data: the text is the model's own.
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

_SEQUENCES, _TOKENS, _SEED = 16, 64, 0  # of the text that is drawn where none is given


def add_fisher_information(
    report: SpectralReport,
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    names: Collection[str] | None = None,
    progress: bool = True,
) -> SpectralReport:
    r"""A report with the Fisher information of its units: what training one must cost the model, to second order.

    A small update $\Delta$ of a unit moves the model by $\mathrm{KL} \approx \frac12 \Delta^\top F \Delta$ nats a
    token, $F = E[g g^\top]$ over text drawn from the model itself, with g the gradient of a sequence's log-probability
    over the root of its length (the tokens' scores are martingale differences, so their products vanish in the mean).
    The figure is the mean of F's diagonal, $\mathrm{tr} F$ over the unit's entries: Adam moves every entry by about
    the learning rate, so that units of equal figures cost about the same for an entry that trains. Gradients come from
    one backward pass a sequence, and one parameter's is held at a time beside the activations.

    Args:
        report: Of the same model.
        model: A causal LM, or a model that holds one and is called with `input_ids` alone. Adapters on it are off
            meanwhile. Left as it is: modes, `requires_grad`, gradients.
        tokens: Text, `(num_sequences, length)`, long, whose first token is given; best the model's own
            (`condft.evaluation.sample_from_base`). None draws 16 sequences of 64 tokens from it.
        names: Units; by default every one of the report that CondFT can train.
        progress: Show a bar.

    Returns:
        The report, with `fisher_information` in those rows. Units that the text does not pass through (a speech
        encoder's, say) have none; a fused expert that no token was sent to has 0.

    Raises:
        KeyError: A name without a row.
        ValueError: A unit whose gradient cannot be had (quantized, sharded, on the meta device, computed by a
            parametrization), a merged adapter, a model that gives no logits or not finite ones, or sequences of fewer
            than 2 tokens.
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
            tokens = _own_text(model, progress=progress)
        traces = _traces(model, parameters, tokens, progress=progress)
    rows = tuple(
        replace(row, fisher_information=traces[row.name] / row.num_parameters) if row.name in traces else row
        for row in report.rows
    )
    return replace(report, rows=rows)


def _own_text(model: nn.Module, *, progress: bool) -> Tensor:
    start = getattr(model, "generation_config", None)
    if start is None:
        raise ValueError(
            f"a {type(model).__name__} does not say where its text begins (it has no generation_config): hand over "
            "tokens, of condft.evaluation.sample_from_base for one"
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
                f"the Fisher information of {name!r} needs its gradient, which cannot be had: {reason}. Measure it on "
                "a whole, plain copy of the model and hand the choice over as target_units."
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
    traces: dict[str, Tensor] = {}  # where the gradients are: a number would have to be waited for
    scale = 1.0 / tokens.shape[0] / (tokens.shape[1] - 1)

    def collect(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None  # one at a time, so that they never add up to a second model
        assert gradient is not None
        for name, slices in parameters[parameter].items():
            part = gradient if slices is None else slices.take(gradient)
            square = torch.linalg.vector_norm(part, dtype=torch.float32).square() * scale
            traces[name] = traces[name] + square if name in traces else square

    with _gradients_of(model, parameters, collect), evaluating(model) as device:
        bar = tqdm(tokens.split(1), desc="Fisher information", unit="sequence", disable=not progress, leave=False)
        for sequence in bar:
            inputs = sequence.to(device)
            logits = getattr(model(input_ids=inputs, use_cache=False), "logits", None)
            if logits is None or logits.shape[:2] != inputs.shape:
                raise ValueError(
                    f"{type(model).__name__} gives no next-token logits for input_ids: Fisher information is that of "
                    "a causal LM's text"
                )
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
    """Within, a backward pass hands each of these parameters to `collect`, its gradient set, and takes no others."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in parameters)
        handles = [parameter.register_post_accumulate_grad_hook(collect) for parameter in parameters]
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Within, no adapter acts.

    Raises:
        ValueError: One is merged.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("an adapter is merged, so the base cannot be measured: call unmerge_adapter() first")
    on = [layer for layer in layers if not layer.disable_adapters]
    with flags_kept(model):
        try:
            for layer in on:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in on:
                layer.enable_adapters(True)
