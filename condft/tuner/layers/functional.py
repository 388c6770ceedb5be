"""Layers of one weight, computed with the adapter's copy by the functional form of their kind (`F.linear`, ...).

Not `torch.func.functional_call`: FSDP1 with `use_orig_params` keeps its views of the flat parameters in the module's
`__dict__`, where Python finds them first, so the call would silently use the base weight.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.pytorch_utils import Conv1D

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.layers.dequantize import dequantized
from condft.tuner.layers.mixed_batch import mixed_forward
from condft.tuner.layers.mixed_precision import mixed_precision_linear
from condft.tuner.layers.slices import Slices
from condft.tuner.layers.substitution import has_hooks, substituted

__all__ = ["SLICEABLE_LAYERS", "SUPPORTED_LAYERS", "FunctionalLayer"]

SLICEABLE_LAYERS = (nn.Linear, Conv1D)
SUPPORTED_LAYERS = (*SLICEABLE_LAYERS, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FunctionalLayer(CondFTLayer):
    """Wraps one of `SUPPORTED_LAYERS` that has the forward of its kind: trains its weight, and its bias if asked.

    The weight of a linear layer can also train in some rows or some columns.
    """

    takes_samples_first = True

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return mixed_forward(self, x, *args, adapter_names=adapter_names, **kwargs)
        adapter = self._adapter_in_effect()
        if adapter is None:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        if has_hooks(self.base_layer):
            # Only a call of the module runs its hooks, so the product replaces its forward during that call.
            with substituted(self.base_layer, {"forward": partial(self._product, adapter)}):
                hooked: Tensor = self.base_layer(x, *args, **kwargs)
            return hooked
        return self._product(adapter, x)

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        """The layer's result with an adapter's copies, without the layer's hooks."""
        base = self._base
        weight: Tensor = self.copies_of("weight")[adapter]
        if isinstance(base, nn.Embedding):
            options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
            # The input is integers, so the weight alone decides the output's dtype.
            return F.embedding(x, weight.to(base.weight.dtype), *options)
        is_quantized = self.quantization_backend is not None
        if is_quantized:  # the dtype of a quantized weight is that of its packed bits: the copy follows the input
            self._warn_of_lost_updates(weight)
        else:
            x = self._cast_input_dtype(x, base.weight.dtype)
        bias = self._bias(adapter)
        slices = self.slices["weight"][adapter]
        if slices is not None and is_quantized:
            # The product is inside the block, so that its backward dequantizes again instead of keeping the weight.
            with dequantized(base, _product_dtype(x)) as weights:
                return _spliced_linear(x, weights, weight, bias, slices, transposed=False)
        if slices is not None:
            return _spliced_linear(x, base.weight, weight, bias, slices, transposed=isinstance(base, Conv1D))
        return self._whole_product(x, weight, bias)

    def _whole_product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The result of a layer whose whole weight is a copy."""
        base = self._base
        # Under autocast the copies are passed as they are: autocast casts them once a step and caches the result.
        if not _autocasts(x):
            if isinstance(base, nn.Linear):
                return mixed_precision_linear(x, weight, bias)
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        if isinstance(base, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(base, Conv1D):
            assert bias is not None  # a Conv1D always has one
            flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)  # as Conv1D's own forward
            return flat.reshape(*x.shape[:-1], base.nf)
        convolved: Tensor = base._conv_forward(x, weight, bias)
        return convolved

    def _warn_of_lost_updates(self, copy: Tensor) -> None:
        if self.training and copy.requires_grad and copy.dtype.itemsize < 4:
            # One place and one text for all layers, so that Python's filter shows it once.
            warnings.warn(
                f"weights are trained in {str(copy.dtype).removeprefix('torch.')} over a quantized base, where most "
                "updates of full-rank training vanish in rounding. TRL's trainers cast them so, as suits LoRA: after "
                "the trainer is made, set parameter.data = parameter.data.float() for every parameter that requires a "
                "gradient.",
                stacklevel=2,
            )

    def _bias(self, adapter: str) -> Tensor | None:
        bias: Tensor | None = self._base.bias
        if bias is None or adapter not in self.slices.get("bias", ()):
            return bias
        slices, copy = self.slices["bias"][adapter], self.copies_of("bias")[adapter]
        # In the copy's dtype, which may be wider than the base's; the product casts the result.
        return copy if slices is None else slices.splice(bias.to(copy.dtype), copy)


def _autocasts(x: Tensor) -> bool:
    device = x.device.type  # torch.is_autocast_enabled raises for the meta device
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def _spliced_linear(
    x: Tensor, base: Tensor, values: Tensor, bias: Tensor | None, slices: Slices, *, transposed: bool
) -> Tensor:
    """A linear layer in which `values` replace some rows or columns of the weight.

    Args:
        x: `(..., in_features)`.
        base: `(out_features, in_features)`, or its transpose.
        values: The slices' values, oriented as `base`.
        bias: `(out_features,)` or None.
        slices: Which rows or columns of `base` they replace.
        transposed: Whether `base` is `(in_features, out_features)`, as a `Conv1D` keeps it.
    """
    dtype = _product_dtype(x)
    if transposed:
        base, values, slices = base.t(), values.t(), slices.transposed()
    bias = None if bias is None else bias.to(dtype)
    # The casts are outside of the Function, so that autograd undoes them, and autocast is off inside: it would cast
    # what is in its dtype already.
    with torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext():
        result: Tensor = _SplicedLinear.apply(x.to(dtype), base.to(dtype), values.to(dtype), bias, slices)
    return result


class _SplicedLinear(torch.autograd.Function):
    """`F.linear` with a spliced weight. The weight is spliced again for the backward instead of being kept.

    Only the gradient of the slices is computed, never that of the whole weight.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, base: Tensor, values: Tensor, bias: Tensor | None, slices: Slices
    ) -> Tensor:
        ctx.save_for_backward(x, base, values)
        ctx.slices = slices  # type: ignore[attr-defined]  # autograd's own way to pass on what is no tensor
        return F.linear(x, slices.splice(base, values), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, base, values = ctx.saved_tensors
        slices: Slices = ctx.slices
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        for_x = for_values = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = grad @ slices.splice(base, values)
        if ctx.needs_input_grad[2]:
            # Rows of the weight are columns of the output's gradient; columns of the weight are columns of the input.
            rows = slices.take(flat_grad, dim=1) if slices.dim == 0 else flat_grad
            columns = slices.take(flat_x, dim=1) if slices.dim == 1 else flat_x
            for_values = rows.t() @ columns  # the slices' gradient alone, not cut out of a whole one
        if ctx.needs_input_grad[3]:
            for_bias = flat_grad.sum(0)
        return for_x, None, for_values, for_bias, None
