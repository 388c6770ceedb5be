"""Fused experts: only the selected slices of each stack are copied and train."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from condft.tuner.layers.experts.stack import ExpertStack, expert_stack
from condft.tuner.layers.substitution import SubstitutingLayer

__all__ = ["ExpertsLayer"]

# What reads a stack by torch's own operations only. Others hand it to kernels that need a plain tensor.
_PLAIN_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


class ExpertsLayer(SubstitutingLayer):
    """Wraps a module with stacks of expert weights (`gate_up_proj`, `down_proj`), each with slices of its own."""

    def _connected(self, result: Any, acting: Mapping[str, Tensor]) -> Any:
        """With the trained copies in its graph even if no token went to any of them."""
        if torch.is_grad_enabled():
            for stack in acting.values():
                if isinstance(stack, ExpertStack) and stack.parts.values.requires_grad and not stack.parts.is_in_graph:
                    result = _connected(result, stack.parts.rows[0])
        return result

    def _acting_tensor(self, parameter: str, adapter: str) -> Tensor:
        slices = self.slices[parameter][adapter]
        base = self.base_parameter(parameter)
        implementation = getattr(getattr(self._base, "config", None), "_experts_implementation", None)
        if (
            slices is None
            or base.ndim != 3
            or type(base.data) is not Tensor
            or implementation not in _PLAIN_IMPLEMENTATIONS
            or torch.compiler.is_compiling()  # which traces what the stack is made of, and fuses it
        ):
            return super()._acting_tensor(parameter, adapter)
        return expert_stack(base, self.copies_of(parameter)[adapter], slices)


def _connected(result: Any, row: Tensor) -> Any:
    if isinstance(result, Tensor):
        return _Connect.apply(result, row)
    return (_Connect.apply(result[0], row), *result[1:])


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, row: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        return grads[0], None
