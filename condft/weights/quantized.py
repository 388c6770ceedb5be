"""Quantized weights: recognized, and dequantized one at a time; they are never scored as the raw codes they hold.

| kind | what happens | tested |
| --- | --- | --- |
| bitsandbytes 4-bit (nf4, fp4, double quantization) | dequantized | on CPU, if bitsandbytes is installed |
| bitsandbytes 8-bit, scales on the weight or, after a forward, on the module | dequantized | the same |
| torchao tensors | dequantized by their own `dequantize` | int8, float8, intx weight-only on CPU, if installed |
| GGUF blocks kept packed (transformers with `kernels`) | dequantized by transformers | on CPU, with made-up blocks |
| float8 with one scale, one a row, or a grid (`weight_scale_inv`) | dequantized | on CPU |
| anything else (GPTQ, AWQ, HQQ, quanto, compressed-tensors, BitNet, EETQ, MXFP4, …) | skipped by name | marks only |

Not tested, since a GPU or the library was missing: bitsandbytes on CUDA, its 4-bit weights repacked for AVX-512
(skipped), torchao int4 (needs `mslk`), a model that transformers itself left packed, and real checkpoints of the last
row.
A GGUF file loaded without `kernels` is dequantized by transformers as it is loaded: nothing here concerns it.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from condft.spectra import code_rounding_error, rounding_noise
from condft.weights.unit import DeferredWeight

__all__ = ["QuantizedWeight", "packed_buffers", "quantized_weight"]

# Names under which quantizers keep a layer's codes as a buffer, where a walk over parameters does not see them.
_PACKED_NAMES = ("weight", "qweight", "W_q", "weight_packed", "codes", "qidxs", "dense_weights")
_GGUF_BLOCK = 32  # entries to a scale; super-blocks of 256 scale the scales
_SCALE_MARKS = ("scale", "scales", "scale_inv", "scb", "absmax", "zeros", "precision_config")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as codes, not as its values.

    Attributes:
        kind: Name of the quantization, for people.
        deferred: Reads the dequantized values; None if that is not possible here.
        rounding_error: Rounding error of the codes relative to the entries (`spectra.code_rounding_error`); None if it
            is not known.
    """

    kind: str
    deferred: DeferredWeight | None = None
    rounding_error: float | None = None


def quantized_weight(module: nn.Module, key: str, tensor: Tensor) -> QuantizedWeight | None:
    """The quantization of a module's parameter, with its values; None for a plain parameter.

    Args:
        module: The module of the parameter; some kinds keep the scales there.
        key: The parameter's name in the module.
        tensor: The parameter. Not modified, and not moved.
    """
    # By name: bitsandbytes and torchao are optional, and importing them takes time.
    kind = type(tensor).__name__
    if kind == "Params4bit":
        return _bitsandbytes_4bit(tensor)
    if kind == "Int8Params":
        return _bitsandbytes_8bit(module, tensor)
    if type(tensor).__module__.partition(".")[0] == "torchao":
        # Its dtype and shape are those of the values; `detach` drops the Parameter but keeps the kind.
        read = tensor.detach().dequantize
        deferred = DeferredWeight(tuple(tensor.shape), tensor.dtype, read)
        return QuantizedWeight(f"torchao {kind}", deferred, _torchao_error(tensor))
    if type(module).__module__.startswith("transformers.integrations.gguf"):
        return _gguf_blocks(module, key, tensor) if tensor.dtype == torch.uint8 else None
    scale = _scale_of(module, key)
    if _is_float8(tensor.dtype) and scale is not None:
        return _scaled_float8(module, tensor, *scale)
    if not tensor.dtype.is_floating_point and (scale is not None or key in _PACKED_NAMES[1:]):
        return QuantizedWeight(f"{type(module).__name__}, {_name(tensor.dtype)}")
    return None


def packed_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Quantized weights that a module keeps in buffers or in torch's own packed form: key, tensor, kind."""
    for key, buffer in module.named_buffers(recurse=False):
        is_code = not buffer.dtype.is_floating_point or _is_float8(buffer.dtype)
        if key in _PACKED_NAMES and buffer.ndim >= 1 and is_code:
            yield key, buffer, f"{type(module).__name__}, {_name(buffer.dtype)} in a buffer"
    if type(module).__module__.startswith("torch.ao.nn.quantized") and callable(getattr(module, "weight", None)):
        weight: Tensor = module.weight()  # type: ignore[operator]  # a method there, where others have a parameter
        yield "weight", weight, f"torch.ao {type(module).__name__}, {_name(weight.dtype)}"


def _bitsandbytes_4bit(weight: Any) -> QuantizedWeight:
    state = weight.quant_state
    if state is None:
        return QuantizedWeight("bitsandbytes 4-bit, not quantized yet: move the model to its device first")
    kind = f"bitsandbytes 4-bit ({state.quant_type})"

    def read() -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # A copy: the lines below change it, and the model goes on with its own.
        codes, flat = weight.data, copy.copy(state)
        if getattr(state, "packing_format_for_cpu", False):
            codes = _unpacked(codes, flat)
        # Flat: bitsandbytes 0.50 on CPU mistakes the scales of rows whose length is no multiple of the block size.
        flat.shape = torch.Size([state.shape.numel()])
        values: Tensor = dequantize_4bit(codes, flat)
        return values.reshape(state.shape)

    error = code_rounding_error(state.code, state.blocksize)
    return QuantizedWeight(kind, DeferredWeight(tuple(state.shape), state.dtype, read), error)


def _unpacked(codes: Tensor, state: Any) -> Tensor:
    """Undoes the packing by a forward without gradients on CPUs with AVX-512 BF16 (bitsandbytes 0.50).

    The scales keep that forward's rounding to bf16: later forwards use the rounded ones. `state` is changed to match.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # else they would be quantized again
    unpacked: Tensor
    unpacked, _ = _convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = scales
    return unpacked


def _bitsandbytes_8bit(module: Any, weight: Any) -> QuantizedWeight | None:
    if weight.dtype != torch.int8:
        return None  # bitsandbytes quantizes when the model moves to its device: these are still the plain values
    # The first forward moves the scales from the weight to the module.
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if scale is None:
        return QuantizedWeight("bitsandbytes 8-bit without its scales (SCB)")

    def read() -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        values: Tensor = int8_vectorwise_dequant(weight.data, scale.to(weight.device))
        return values

    deferred = DeferredWeight(tuple(weight.shape), torch.float32, read)
    return QuantizedWeight("bitsandbytes 8-bit", deferred, _integer_error(8, weight.shape[1]))


def _gguf_blocks(module: Any, key: str, blocks: Tensor) -> QuantizedWeight:
    from transformers.integrations.gguf.dequant import GGML_NAME, dequantize

    types = {"gate_up_proj": "gate_up_type", "down_proj": "down_type"}
    ggml_type = getattr(module, types.get(key, "ggml_type"))
    in_features = {
        "gate_up_proj": "hidden_dim",
        "down_proj": "intermediate_dim",
        "weight": "in_features" if hasattr(module, "in_features") else "embedding_dim",
    }[key]
    shape = (*blocks.shape[:-1], getattr(module, in_features))
    order = getattr(module, "input_permutation", None)

    def read() -> Tensor:
        values: Tensor = dequantize(blocks.detach(), ggml_type, torch.float32).reshape(shape)
        # The module permutes its input: putting the columns back instead gives the weight that acts.
        return values if order is None else values[..., torch.argsort(order)]

    kind = f"GGUF {GGML_NAME.get(ggml_type, ggml_type)}"
    bits = re.match(r"GGUF I?Q(\d)_", kind)
    error = _integer_error(int(bits[1]), _GGUF_BLOCK) if bits else None
    return QuantizedWeight(kind, DeferredWeight(shape, torch.float32, read), error)


def _scaled_float8(module: nn.Module, weight: Tensor, name: str, scale: Any) -> QuantizedWeight:
    kind = f"{_name(weight.dtype)} with {name} ({type(module).__name__})"
    if not isinstance(scale, Tensor) or not scale.dtype.is_floating_point or weight.ndim != 2:
        return QuantizedWeight(kind)
    rows, columns = weight.shape
    block = getattr(module, "block_size", None)
    if scale.numel() == 1 or tuple(scale.shape) == (rows, 1):
        block = (rows, columns) if scale.numel() == 1 else (1, columns)
    elif block is None or tuple(scale.shape) != (ceil(rows / block[0]), ceil(columns / block[1])):
        return QuantizedWeight(f"{kind} of shape {tuple(scale.shape)}")

    def read() -> Tensor:
        values, factors = weight.detach().float(), scale.detach().float().reshape(ceil(rows / block[0]), -1)
        for index, factor in enumerate(factors):  # by blocks of rows: no second matrix of this size
            # The last block of a row may reach beyond the matrix.
            values[index * block[0] : (index + 1) * block[0]] *= factor.repeat_interleave(block[1])[:columns]
        return values

    return QuantizedWeight(kind, DeferredWeight((rows, columns), torch.float32, read), _float_error(weight.dtype))


def _torchao_error(weight: Any) -> float | None:
    codes = getattr(weight, "qdata", None)
    if codes is None:
        return None
    if _is_float8(codes.dtype):
        return _float_error(codes.dtype)
    width = re.fullmatch(r"int(\d)", _name(getattr(weight, "target_dtype", codes.dtype)))
    block = getattr(weight, "block_size", None)
    return _integer_error(int(width[1]), block[-1]) if width and block else None


def _float_error(dtype: torch.dtype) -> float:
    return rounding_noise((1, 1), dtype, 1.0) / 2.0  # a 1 x 1 matrix has the norm s (1 + 1)


def _integer_error(bits: int, group: int) -> float:
    """Of evenly spaced codes, symmetric about zero."""
    # An odd number of codes: the most negative integer has no positive counterpart and stays unused.
    return code_rounding_error(torch.linspace(-1, 1, 2**bits - 1, device="cpu"), group)


def _scale_of(module: nn.Module, key: str) -> tuple[str, Any] | None:
    """The scales that belong to a parameter: an attribute of the module whose name begins with the parameter's."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for name, value in own.items():
        if name != key and name.lower().removeprefix(f"{key.lower()}_") in _SCALE_MARKS:
            return name, value
    return None


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
