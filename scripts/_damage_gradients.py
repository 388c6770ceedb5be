"""Shared backward passes: every tensor's direction of training, and what gradients alone predict of it.

One pass over German batches gives all tensors' directions at once, another over the base's own text their curvature.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAM_EPSILON = 1e-8


def adam_directions(model: Any, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    r"""Where AdamW would begin to go: mean over root mean square of the batches' gradients, entry by entry.

    That is the sum of Adam's steps over these batches in the limit of small steps and slow averages (no bias, no
    decay): a first-order direction, taken at the base and for each tensor as if the others stood still.

    Args:
        model: The base, a causal LM; left without gradients.
        names: The tensors.
        batches: `(size, window)` of tokens each, two or more.

    Returns:
        Name -> `direction` (a tensor of the weight's shape and Frobenius norm 1), `gradient_norm` (of the mean
        gradient), `slope` (fall of the batches' loss per unit of the direction, first order).
    """
    means = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    squares = {name: torch.zeros_like(mean) for name, mean in means.items()}
    with _training_only(model, names) as parameters:
        for tokens in batches:
            _mean_loss(model, tokens).backward()
            for name, gradient in _take_gradients(parameters):
                means[name].add_(gradient, alpha=1 / len(batches))
                squares[name].addcmul_(gradient, gradient, value=1 / len(batches))
    found = {}
    for name, mean in means.items():
        direction = -mean / (squares[name].sqrt() + ADAM_EPSILON)
        direction /= direction.norm()
        slope = -float((mean * direction).sum())
        found[name] = {"direction": direction, "gradient_norm": float(mean.norm()), "slope": slope}
    return found


def fisher_information(
    model: Any, directions: Mapping[str, Tensor], sequences: Tensor
) -> dict[str, tuple[float, float]]:
    r"""Curvature of the KL divergence to the base, $\mathrm{KL} \approx \frac12 \Delta^T F \Delta$, per token.

    $F = E[g g^T]$ over text drawn from the model itself, g the gradient of a sequence's log-probability divided by
    the root of its length (the tokens' scores are martingale differences, so their products vanish in the mean).

    Args:
        model: The base, a causal LM.
        directions: Name -> direction of Frobenius norm 1.
        sequences: `(num_sequences, length)`, drawn from the model; its first token is given.

    Returns:
        Name -> (trace of F, F along the direction).
    """
    trace = dict.fromkeys(directions, 0.0)
    along = dict.fromkeys(directions, 0.0)
    with _training_only(model, list(directions)) as parameters:
        for tokens in sequences.split(1):
            count = tokens.shape[1] - 1
            _mean_loss(model, tokens).backward()
            for name, gradient in _take_gradients(parameters):
                trace[name] += float(gradient.square().sum()) * count / len(sequences)
                along[name] += float((gradient * directions[name]).sum()) ** 2 * count / len(sequences)
    return {name: (trace[name], along[name]) for name in directions}


def _mean_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())


@contextmanager
def _training_only(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within, gradients are taken of these parameters alone; afterwards of none."""
    model.eval().requires_grad_(False)  # eval: no dropout, the direction is the model's own
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    yield parameters
    model.requires_grad_(False)


def _take_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        yield name, parameter.grad
        parameter.grad = None
