"""Shared backward passes: every unit's direction of training, and what gradients alone predict of it.

One pass over the task's batches gives all units' directions, another over text sampled from the base their curvature.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAM_EPSILON = 1e-8


def adam_directions(
    model: Any, names: Sequence[str], losses: Sequence[Callable[[], Tensor]]
) -> dict[str, dict[str, Any]]:
    r"""The direction that AdamW would start in: mean over root mean square of the batches' gradients, entry by entry.

    That is the sum of Adam's steps over these batches in the limit of small steps and slow averages (no bias, no
    decay): a first-order direction, taken at the base and for each unit as if no other unit changed.

    Args:
        model: The base; left without gradients.
        names: The units: weights, or experts of a fused stack (`...gate_up_proj[3]`).
        losses: One for each batch, two or more: computes the model's mean loss over that batch.

    Returns:
        Name -> `direction` (a tensor of the unit's shape and Frobenius norm 1), `gradient_norm` (of the mean
        gradient), `slope` (fall of the batches' loss per unit of the direction, first order).
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    with _training_only(model, names) as units:
        for loss in losses:
            loss().backward()
            for name, gradient in _take_gradients(units):
                if name not in sums:
                    sums[name], squares[name] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                sums[name].add_(gradient)
                squares[name].addcmul_(gradient, gradient)
    found = {}
    for name in names:
        # pop: the sums are as large as the units together; each is freed when its direction is made.
        mean = sums.pop(name).div_(len(losses))
        direction = -mean / (squares.pop(name).div_(len(losses)).sqrt_() + ADAM_EPSILON)
        direction /= direction.norm()
        slope = -float((mean * direction).sum())
        found[name] = {"direction": direction, "gradient_norm": float(mean.norm()), "slope": slope}
    return found


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross entropy (nats) of a causal LM over `(size, window)` tokens, each but the first an answer."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def fisher_information(
    model: Any, directions: Mapping[str, Tensor], sequences: Tensor
) -> dict[str, tuple[float, float]]:
    r"""Curvature of the KL divergence to the base, $\mathrm{KL} \approx \frac12 \Delta^T F \Delta$, per token.

    $F = E[g g^T]$ over text sampled from the model, g the gradient of a sequence's log-probability divided by
    the root of its length (the tokens' scores are martingale differences, so their products vanish in the mean).

    Args:
        model: The base, a causal LM.
        directions: Name -> direction of Frobenius norm 1.
        sequences: `(num_sequences, length)`, sampled from the model; the first token is the prompt.

    Returns:
        Name -> (trace of F, F along the direction).
    """
    trace = dict.fromkeys(directions, 0.0)
    along = dict.fromkeys(directions, 0.0)
    with _training_only(model, list(directions)) as units:
        # One sequence at a time: the squares are those of single gradients, not of their mean.
        for tokens in sequences.split(1):
            count = tokens.shape[1] - 1
            language_loss(model, tokens).backward()
            for name, gradient in _take_gradients(units):
                # The loss is a mean over the tokens, so g is its gradient times the root of their number.
                trace[name] += float(gradient.square().sum()) * count / len(sequences)
                along[name] += float((gradient * directions[name]).sum()) ** 2 * count / len(sequences)
    return {name: (trace[name], along[name]) for name in directions}


@dataclass(frozen=True)
class _Unit:
    """A parameter, or one expert of it."""

    parameter: nn.Parameter
    expert: int | None


@contextmanager
def _training_only(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Unit]]:
    """Inside, only these units' parameters get gradients; afterwards none does."""
    model.eval().requires_grad_(False)  # eval: no dropout, the direction is the model's own
    yield {name: _unit(model, name) for name in names}
    model.requires_grad_(False)


def _unit(model: nn.Module, name: str) -> _Unit:
    found = re.fullmatch(r"(.+)\[(\d+)\]", name)
    parameter = model.get_parameter(found[1] if found else name)
    parameter.requires_grad_(True)
    return _Unit(parameter, int(found[2]) if found else None)


def _take_gradients(units: Mapping[str, _Unit]) -> Iterator[tuple[str, Tensor]]:
    for name, unit in units.items():
        gradient = unit.parameter.grad
        assert gradient is not None
        yield name, gradient if unit.expert is None else gradient[unit.expert]
    # After all are read: experts of one stack share its gradient.
    for unit in units.values():
        unit.parameter.grad = None
