"""Quantized layers: the dense values that a copy starts from, and the dense layer that a merge puts in.

In the forward the copy replaces the quantized weight, whose bits never change. If only some heads train, the other
rows are still needed: they are dequantized for one product and not kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from condft.weights.quantized import QuantizedWeight, quantized_weight

__all__ = [
    "DequantizingBackend",
    "dense_layer",
    "dense_values",
    "dequantized",
    "exempt_from_quantization",
    "is_quantized",
    "shape_of",
    "why_not_trainable",
    "working_dtype",
]


class DequantizingBackend(QuantizationBackend):
    """How PEFT reads a quantized layer's weight, and what its `get_layer_status` calls the kind of quantization."""

    layer_type = "linear"  # the only quantized layers that train: see `why_not_trainable`
    supports_merge = True  # into a dense layer: see `merging`

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name

    @classmethod
    def of(cls, module: nn.Module) -> "DequantizingBackend | None":
        """The backend of a layer; None if its weight is not quantized, or it has none."""
        found = _quantized(module, "weight")
        return None if found is None else cls(found.kind)

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return dense_values(base_layer, "weight")


# torch's hooks compute `weight` from `weight_orig` (pruning, spectral_norm) or from `weight_v` (weight_norm).
_COMPUTED_FROM = ("orig", "v")


def is_quantized(layer: nn.Module) -> bool:
    """Whether the bits of a layer's `weight` are not its values."""
    return _quantized(layer, "weight") is not None


def why_not_trainable(module: nn.Module, key: str) -> str | None:
    """Why the way in which a parameter is stored rules out a trainable copy; None if it does not.

    A copy of a computed parameter would train, but a merge would write into a tensor that is computed anew.

    >>> why_not_trainable(nn.Linear(2, 2), "weight") is None
    True
    >>> why_not_trainable(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), "weight")
    'it is computed by a parametrization: make it a plain parameter first, with ...'
    """
    if nn.utils.parametrize.is_parametrized(module, key):
        return (
            "it is computed by a parametrization: make it a plain parameter first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if any(f"{key}_{part}" in module._parameters for part in _COMPUTED_FROM):
        return (
            "it is computed by a hook: make it a plain parameter first, with prune.remove, remove_weight_norm or "
            "remove_spectral_norm of torch.nn.utils"
        )
    found = _quantized(module, key)
    if found is None:
        return None
    if found.deferred is None:
        return f"it is quantized ({found.kind}) and cannot be dequantized here"
    is_linear = isinstance(module, nn.Linear) and key == "weight"
    if not is_linear or found.deferred.shape != (module.out_features, module.in_features):
        return f"it is quantized ({found.kind}), and of quantized weights CondFT trains those of Linear layers"
    return None


def dense_values(module: nn.Module, parameter: str) -> Tensor:
    """A parameter's values: the parameter itself, detached, or the dequantized values if it is quantized.

    Args:
        module: Owns the parameter, directly or through a submodule.
        parameter: Its name in the module, such as `weight` or `out_proj.weight`.

    Raises:
        ValueError: The kind of quantization is one that cannot be dequantized here.
    """
    owner, _, key = parameter.rpartition(".")
    holder = module.get_submodule(owner)
    found = _quantized(holder, key)
    if found is None:
        values: Tensor = getattr(holder, key).detach()  # no copy: to keep the values, clone them
        return values
    if found.deferred is None:
        raise ValueError(f"{parameter} of {type(module).__name__} cannot be dequantized here: it is {found.kind}")
    return found.deferred.read()


def shape_of(module: nn.Module, key: str) -> tuple[int, ...]:
    """The shape of a parameter's values, which differs from that of packed bits."""
    found = _quantized(module, key)
    return tuple(getattr(module, key).shape) if found is None or found.deferred is None else found.deferred.shape


def dense_layer(module: nn.Module, weight: Tensor) -> nn.Linear:
    """A plain Linear layer that replaces a quantized one.

    Args:
        module: The quantized layer. Its bias is shared, not copied.
        weight: `(out_features, in_features)`; becomes the layer's weight, not copied either.
    """
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")  # no memory for values that are replaced
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = module.bias  # type: ignore[assignment]
    return layer.train(module.training)


@contextmanager
def dequantized(module: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """A quantized layer's weight, `(out_features, in_features)`, whose values are not kept for the backward.

    If an autograd function in the block saves the weight, nothing is saved, and the backward dequantizes it again.
    """
    weight = dense_values(module, "weight").to(dtype)
    mark = (weight.data_ptr(), weight.shape)  # not the weight: the hooks live as long as the graph and would keep it

    def pack(saved: Tensor) -> Any:
        # Other tensors of the block, the input for example, are kept as usual.
        return None if (saved.data_ptr(), saved.shape) == mark else saved

    def unpack(packed: Any) -> Tensor:
        return dense_values(module, "weight").to(dtype) if packed is None else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield weight


def working_dtype(model: nn.Module) -> torch.dtype:
    """The dtype a model computes in: that of its first parameter of 16 bits or more that is not quantized."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            # Floats of one byte (float8) are for storage.
            wide = parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
            if wide and _quantized(module, key) is None:
                return parameter.dtype
    return torch.get_default_dtype()


def exempt_from_quantization(model: Any, dense: Iterable[str]) -> None:
    """Lists modules that became dense in the quantization config of a transformers model.

    Otherwise a checkpoint of the merged model would be read as if these modules were still quantized.

    Args:
        model: Any module. Nothing changes unless transformers quantized it.
        dense: Paths of modules in it.
    """
    quantizer, names = getattr(model, "hf_quantizer", None), list(dense)
    if quantizer is None or not names:
        return
    config = model.config.quantization_config
    for option in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes' name, and the others'
        if hasattr(config, option):
            # A list replaces transformers' default exemptions (the head, for example), so it must repeat them.
            exempt = getattr(config, option) or getattr(quantizer, "modules_to_not_convert", None) or ()
            setattr(config, option, sorted({*exempt, *names}))


def _quantized(module: nn.Module, key: str) -> QuantizedWeight | None:
    tensor = getattr(module, key, None)
    return quantized_weight(module, key, tensor) if isinstance(tensor, Tensor) else None
