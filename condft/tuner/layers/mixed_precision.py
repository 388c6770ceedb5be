"""A linear layer whose weight is kept in a wider dtype than the product is computed in.

`F.linear(x, weight.to(x.dtype))` would keep the cast weight from the forward to the backward: for an fp32 copy over a
bf16 base that is two bytes per number. Here the weight is cast a second time in the backward, which costs one pass
over it and keeps nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mixed_precision_linear"]


def mixed_precision_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in `x`'s dtype. Result and gradients are the same bits as after a cast of weight and bias.

    Args:
        x: `(..., in_features)`.
        weight: `(out_features, in_features)`, in any floating dtype. Its gradient has the same dtype.
        bias: `(out_features,)` or None, in any floating dtype.

    >>> x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, requires_grad=True)
    >>> result = mixed_precision_linear(x, weight, None)
    >>> result.sum().backward()
    >>> result.dtype, weight.grad.dtype
    (torch.bfloat16, torch.float32)
    """
    bias = None if bias is None else bias.to(x.dtype)
    # torch.compile chooses by itself what the backward recomputes, and cannot look into an autograd.Function.
    if weight.dtype == x.dtype or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight.to(x.dtype), bias)
    result: Tensor = _MixedPrecisionLinear.apply(x, weight, bias)
    return result


class _MixedPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)  # the wide weight exists anyway, so this keeps no memory
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
            # In the order of F.linear's own backward, so that the bits are the same; widened after the product.
            for_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_x, for_weight, for_bias
