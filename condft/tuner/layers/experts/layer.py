"""Fused experts: only the selected experts of each stack are copied and train."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from condft.tuner.layers.experts.stack import ExpertStack, expert_stack
from condft.tuner.layers.substitution import SubstitutingLayer

__all__ = ["ExpertsLayer"]

# transformers' implementations that use torch's own operations only. Others pass the stack to kernels that need a
# plain tensor.
_PLAIN_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


class ExpertsLayer(SubstitutingLayer):
    """Wraps a module with stacks of expert weights (`gate_up_proj`, `down_proj`), of which some experts train."""

    def _connected(self, result: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The result with the trained copies in its graph, even if no token was routed to any of them.

        Without that they would get no gradient, and DDP and FSDP would wait for it for ever.
        """
        if torch.is_grad_enabled():
            for stack in tensors.values():
                if isinstance(stack, ExpertStack) and stack.parts.values.requires_grad and not stack.parts.is_in_graph:
                    # One matrix is enough: `_Unbind` gives every expert of the stack its gradient.
                    result = _connected(result, stack.parts.matrices[0])
        return result

    def _effective_tensor(self, parameter: str, adapter: str) -> Tensor:
        slices = self.slices[parameter][adapter]
        base = self.base_parameter(parameter)
        implementation = getattr(getattr(self._base, "config", None), "_experts_implementation", None)
        if (
            slices is None  # a parameter of which all trains: its copy is used as it is
            or base.ndim != 3  # a bias of the experts, which is small
            or type(base.data) is not Tensor  # a DTensor or another subclass: `ExpertStack` views plain memory
            or implementation not in _PLAIN_IMPLEMENTATIONS
            or torch.compiler.is_compiling()  # it fuses a splice, and cannot trace the subclass
        ):
            return super()._effective_tensor(parameter, adapter)
        return expert_stack(base, self.copies_of(parameter)[adapter], slices)


def _connected(result: Any, matrix: Tensor) -> Any:
    if isinstance(result, Tensor):
        return _Connect.apply(result, matrix)
    return (_Connect.apply(result[0], matrix), *result[1:])


class _Connect(torch.autograd.Function):
    """Returns its first argument and makes autograd visit the second, whose gradient `_Unbind` fills with zeros."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, matrix: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        return grads[0], None
