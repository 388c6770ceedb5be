"""Walks a live model or a checkpoint: yields each unit that can be scored, and each other weight with the reason."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from condft.report import Role, SkippedWeight, SkipReason
from condft.weights.checkpoint import open_checkpoint, stored_weights
from condft.weights.heads import HeadSlice, heads_of
from condft.weights.key_mapping import StoredWeights
from condft.weights.names import WRAPPER_PARTS, canonical_name, module_type_of
from condft.weights.quantized import packed_buffers, quantized_weight
from condft.weights.roles import role_of, special_modules
from condft.weights.shards import is_dtensor
from condft.weights.unit import DeferredWeight, Unit, load_ahead

__all__ = [
    "Granularity",
    "Unit",
    "canonical_name",
    "iter_checkpoint_units",
    "iter_modules",
    "iter_units",
    "load_ahead",
    "module_type_of",
]

Granularity = Literal["tensor", "head"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def iter_units(
    model: nn.Module, *, granularity: Granularity = "tensor", stored: StoredWeights | None = None
) -> Iterator[Unit | SkippedWeight]:
    """Yields every unit of a model, and every other parameter with the reason why it is none, each tensor once.

    A tensor that several modules share (tied embeddings) is yielded under its first name and skipped as TIED under the
    others. A tensor of more than two dimensions is one matrix `(out, in * kernel)` if its module is a convolution;
    otherwise it is a stack of matrices over the leading dimensions, one unit for each.

    A unit whose values are not in memory has `Unit.deferred` set; `Unit.load` or `load_ahead` loads the values. These
    are sharded DTensors (gathered one at a time, by all processes together), quantized weights (dequantized), and
    weights on the meta device (read from the checkpoint that the model names in `name_or_path`, if it is on this
    machine).

    Args:
        model: The model. Not modified.
        granularity: "tensor", or "head" to split the weights of attention into heads; see `condft.weights.heads`.
        stored: Where the values of meta tensors are; by default the checkpoint that the model names.

    Yields:
        Units and skipped weights, in the order of the model's modules.

    Raises:
        ValueError: Another granularity.

    >>> items = list(iter_units(base))
    >>> items[1].name, items[1].tensor.shape, items[1].role.value
    ('model.layers.0.self_attn.q_proj.weight', torch.Size([32, 32]), 'layer')
    >>> sorted({item.reason.value for item in items if isinstance(item, SkippedWeight)})
    ['fewer_than_two_dimensions', 'tied']
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity is one of {', '.join(get_args(Granularity))}, not {granularity!r}")
    return _Walk(model, granularity, stored).items()


def iter_checkpoint_units(
    path: str | Path, *, granularity: Granularity = "tensor", trust_remote_code: bool = False
) -> Iterator[Unit | SkippedWeight]:
    """The units of a checkpoint, without loading its model: all are deferred, with the names of the loaded model.

    Args:
        path: A folder with `config.json` and safetensors weights, or a hub id.
        granularity: As for `iter_units`.
        trust_remote_code: Passed on to transformers; off unless asked for.

    Raises:
        FileNotFoundError: No such checkpoint, no safetensors, or a shard is missing.
        ValueError: A damaged file, an unknown architecture, or weights that the model needs and no file holds.

    >>> base.save_pretrained("checkpoint")
    >>> unit = next(iter_checkpoint_units("checkpoint"))
    >>> unit.name, unit.tensor.is_meta, unit.load().tensor.is_meta
    ('model.embed_tokens.weight', True, False)
    """
    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    model = checkpoint.build_model(trust_remote_code=trust_remote_code)
    stored = checkpoint.weights_for(model)
    if stored.absent:
        name, found = min(stored.absent.items())
        raise ValueError(
            f"the files in {checkpoint.folder} lack {len(stored.absent)} of the weights of a {type(model).__name__}, "
            f"the first is {name}: {found}. Unused are {len(stored.unused)} tensors {stored.unused[:3]}. "
            "from_pretrained would put random values in their place."
        )
    return iter_units(model, granularity=granularity, stored=stored)


def iter_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """A model's modules, a shared one under each of its paths.

    Args:
        model: The model.

    Yields:
        The path, the module, and whether an adapter or a parametrization added it, so that it is no part of the base.
    """
    adapters: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        # Parents come before children: a wrapper is known when its parts follow.
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            adapters.add(path)
        yield path, module, _is_adapter_part(path, adapters)


@dataclass
class _Walk:
    """One pass over a model's parameters."""

    model: nn.Module
    granularity: Granularity
    given: StoredWeights | None

    @cached_property
    def stored(self) -> StoredWeights | str:
        """Where meta tensors are stored, or why that is not known. Looked up at the first meta tensor."""
        return stored_weights(self.model) if self.given is None else self.given

    def items(self) -> Iterator[Unit | SkippedWeight]:
        special = special_modules(self.model)
        seen: dict[int, str] = {}
        for path, module, inside_adapter in iter_modules(self.model):
            name = canonical_name(path)
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}" if name else key
                if inside_adapter:
                    yield _skip(full, parameter, SkipReason.ADAPTER)
                elif id(parameter) in seen:
                    yield _skip(full, parameter, SkipReason.TIED, f"shares its memory with {seen[id(parameter)]}")
                else:
                    seen[id(parameter)] = full
                    role = special.get(id(module)) or role_of(self.model, path, module, key)
                    yield from self._weight(full, path, module, key, parameter, role)
            if not inside_adapter:
                yield from self._not_parameters(name, path, module, special.get(id(module)))

    def _not_parameters(
        self, name: str, path: str, module: nn.Module, special: Role | None
    ) -> Iterator[Unit | SkippedWeight]:
        """Weights that are no parameters: computed by a parametrization, or packed by a quantizer."""
        prefix = f"{name}." if name else ""
        # Not looked up in `seen`: such a weight is made anew at each access, and ids are used again.
        for key in _parametrized(module):
            # The forward uses the computed weight; its parts (`parametrizations.weight.original`) are never applied.
            role = special or role_of(self.model, path, module, key)
            yield from self._weight(f"{prefix}{key}", path, module, key, getattr(module, key), role)
        for key, buffer, kind in packed_buffers(module):
            yield _skip(f"{prefix}{key}", buffer, SkipReason.QUANTIZED, kind)

    def _weight(
        self, name: str, path: str, module: nn.Module, key: str, tensor: Tensor, role: Role
    ) -> Iterator[Unit | SkippedWeight]:
        deferred: DeferredWeight | None = None
        # A meta tensor has no codes to look at; for it the files say whether it is quantized.
        quantized = None if tensor.is_meta else quantized_weight(module, key, tensor)
        sharded = is_dtensor(tensor)
        if quantized is not None:
            # Of sharded codes, each process has a part only.
            if quantized.deferred is None or sharded:
                yield _skip(name, tensor, SkipReason.QUANTIZED, quantized.kind + ", sharded" * sharded)
                return
            deferred = quantized.deferred
        elif tensor.is_meta:
            found = self._find_stored(name, module, key, tensor)
            if isinstance(found, SkippedWeight):
                # A bias is skipped as a bias also if its values are missing, as in a model that has them.
                yield _first_reason(name, tensor) or found
                return
            deferred = found
        elif sharded:
            # Not called here: all processes must gather together, when the unit is loaded.
            gather = tensor.detach().full_tensor  # type: ignore[attr-defined]
            deferred = DeferredWeight(tuple(tensor.shape), tensor.dtype, gather, collective=True)
        whole = tensor if deferred is None else deferred.stand_in
        skip = _first_reason(name, whole)
        if skip is not None:
            yield skip
            return
        weight = Unit(name, whole, whole, module_type_of(canonical_name(path)), role, deferred)
        if quantized is not None:
            weight = replace(weight, quantization=quantized.kind, rounding_error=quantized.rounding_error)
        yield from self._units_of(weight, path, module)

    def _find_stored(self, name: str, module: nn.Module, key: str, tensor: Tensor) -> DeferredWeight | SkippedWeight:
        stored = self.stored
        if isinstance(stored, str):
            return _skip(name, tensor, SkipReason.META_DEVICE, stored)
        if name in stored.quantized:
            return _skip(name, tensor, SkipReason.QUANTIZED, stored.quantized[name])
        if key in _parametrized(module):
            return _effective(name, module, key, tensor, stored)
        found = stored.deferred.get(name)
        if found is None or found.shape != tuple(tensor.shape):
            held = stored.absent.get(name, "the checkpoint does not hold it in this shape")
            return _skip(name, tensor, SkipReason.META_DEVICE, held)
        # A live model may have another dtype than its files. Given weights have the right one, also where it is fp32.
        return found.to(tensor.dtype) if self.given is None else found

    def _units_of(self, weight: Unit, path: str, module: nn.Module) -> Iterator[Unit | SkippedWeight]:
        if weight.tensor.ndim == 2:
            yield from self._heads(weight, path, module)
        elif isinstance(module, _CONVOLUTIONS):
            yield replace(weight, matrix=weight.tensor.flatten(1))
        else:
            yield from _stack(weight)

    def _heads(self, weight: Unit, path: str, module: nn.Module) -> Iterator[Unit | SkippedWeight]:
        heads: list[HeadSlice] | str | None = None
        if self.granularity == "head" and weight.role is Role.LAYER:
            heads = heads_of(self.model, path, module, tuple(weight.tensor.shape))
        if not isinstance(heads, list):
            yield weight
            if heads is not None:
                yield _skip(f"{weight.name}[h*]", weight.tensor, SkipReason.NOT_SPLIT, heads)
            return
        for head in heads:
            part = head.take(weight.tensor.detach())
            yield replace(
                weight,
                name=f"{weight.name}[{head.label}]",
                tensor=part,
                matrix=part,
                # Heads of q, k and v are of different types, also if one projection holds all.
                module_type=f"{weight.module_type}.{head.part}" if head.part else weight.module_type,
                take=head.take,
            )


def _stack(weight: Unit) -> Iterator[Unit]:
    """The matrices of a stack; each is read alone if the file that holds the stack allows it."""
    # A fused stack has several parameters in one module: the name of the parameter separates gate_up from down.
    stack_type = f"{weight.module_type}.{weight.name.rpartition('.')[2]}"
    for index, matrix in enumerate(weight.tensor.detach().flatten(0, -3)):
        unit = replace(weight, name=f"{weight.name}[{index}]", tensor=matrix, matrix=matrix, module_type=stack_type)
        if weight.deferred is None:
            yield unit
        elif weight.deferred.read_slice is not None:
            yield replace(unit, deferred=weight.deferred.slice(index))
        else:
            yield replace(unit, take=partial(_entry, index=index))


def _entry(stack: Tensor, index: int) -> Tensor:
    return stack.flatten(0, -3)[index]


def _parametrized(module: nn.Module) -> list[str]:
    """Names of the weights that parametrizations compute."""
    return list(module.parametrizations) if nn.utils.parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


def _effective(
    name: str, module: nn.Module, key: str, tensor: Tensor, stored: StoredWeights
) -> DeferredWeight | SkippedWeight:
    """A parametrized weight on the meta device, computed from its parts in the checkpoint."""
    prefix = name.removesuffix(key)
    missing = [part for part, _ in module.named_parameters() if f"{prefix}{part}" not in stored.deferred]
    if missing or any(True for _ in module.buffers()):
        return _skip(name, tensor, SkipReason.META_DEVICE, "its parametrization needs more than the checkpoint holds")

    def read() -> Tensor:
        # A copy: the model itself stays on the meta device.
        filled = copy.deepcopy(module).to_empty(device="cpu")
        with torch.no_grad():
            for part, parameter in filled.named_parameters():
                parameter.copy_(stored.deferred[f"{prefix}{part}"].read())
            value: Tensor = getattr(filled, key)
        return value

    return DeferredWeight(tuple(tensor.shape), tensor.dtype, read)


def _is_adapter_part(path: str, adapters: set[str]) -> bool:
    """Whether a module is inside an adapter's wrapper, but not in the base layer that it wraps."""
    parts = path.split(".") if adapters else []
    for depth in range(len(parts) + 1):
        if ".".join(parts[:depth]) in adapters and (depth == len(parts) or parts[depth] not in WRAPPER_PARTS):
            return True
    return ".parametrizations." in f".{path}."


def _first_reason(name: str, tensor: Tensor) -> SkippedWeight | None:
    """Why a tensor cannot be scored, by its name, shape and dtype alone; None if it can."""
    if tensor.ndim < 2:
        return _skip(name, tensor, SkipReason.FEWER_THAN_TWO_DIMENSIONS)
    if name.rpartition(".")[2].endswith("bias"):  # of a stack of experts: vectors, not a matrix
        return _skip(name, tensor, SkipReason.FEWER_THAN_TWO_DIMENSIONS, "a stack of bias vectors")
    if not tensor.dtype.is_floating_point:
        return _skip(name, tensor, SkipReason.NOT_FLOATING, str(tensor.dtype).removeprefix("torch."))
    return _skip(name, tensor, SkipReason.EMPTY) if tensor.numel() == 0 else None


def _skip(name: str, tensor: Tensor, reason: SkipReason, detail: str = "") -> SkippedWeight:
    return SkippedWeight(name, tuple(tensor.shape), reason, detail)
