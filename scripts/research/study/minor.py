"""An extension of a selection: updates confined to the weights' minor singular directions.

It acts between optimizer steps, so the trainer needs no change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condft.tuner.layers.base import CondFTLayer


def confine_to_minor_directions(model: Any, *, preserved: float = 0.5) -> Callable[[dict[str, Any]], None]:
    r"""Keeps each trained copy's update $D$ equal to $(I - U_h U_h^\top)\, D\, (I - V_h V_h^\top)$.

    $U_h, V_h$ are the base weight's leading singular directions; an expert in a fused stack has its own. A hook
    projects the gradient. Adam then scales it entry by entry, which leaves the subspace, so the update is projected
    again after every step.

    Args:
        model: With `CondFTLayer`s, before training.
        preserved: Share of the singular directions, the leading ones, that stay as they are.
    """
    copies: list[tuple[torch.nn.Parameter, Tensor, Callable[[Tensor], Tensor]]] = []
    for module in model.modules():
        if isinstance(module, CondFTLayer):
            for parameter, slices, copy in module.parts_of(model.active_adapter):
                base = module.base_values(parameter)
                base = base if slices is None else slices.take(base)
                left, _, right = torch.linalg.svd(base.float(), full_matrices=False)
                count = round(preserved * min(base.shape[-2:]))
                project = _projector(left[..., :count], right[..., :count, :])
                copy.register_hook(project)
                copies.append((copy, base, project))

    def after(record: dict[str, Any]) -> None:
        with torch.no_grad():
            for copy, base, project in copies:
                copy.copy_(base + project(copy - base))

    return after


def _projector(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    def project(update: Tensor) -> Tensor:
        update = update - left @ (left.mT @ update)
        return update - (update @ right.mT) @ right

    return project
