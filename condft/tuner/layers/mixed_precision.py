"""A linear layer whose weight is kept in a wider dtype than its product is made in.

`F.linear(x, weight.to(x.dtype))` keeps the cast weight from the forward to the backward: two bytes more for every
number that a fp32 copy over a bf16 base holds. Casting again in the backward costs one pass over the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mixed_precision_linear"]


def mixed_precision_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in `x`'s dtype, with the result and the gradients of casting weight and bias to it first.

    Args:
        x: `(..., in_features)`.
        weight: `(out_features, in_features)`, in any floating dtype; its gradient comes in that one.
        bias: `(out_features,)` or None, as `weight`.
    """
    bias = None if bias is None else bias.to(x.dtype)
    # torch.compile decides itself what is made again in the backward.
    if weight.dtype == x.dtype or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight.to(x.dtype), bias)
    result: Tensor = _MixedPrecisionLinear.apply(x, weight, bias)
    return result


class _MixedPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = grad @ weight.to(x.dtype)
        if ctx.needs_input_grad[1]:
            for_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_x, for_weight, for_bias
