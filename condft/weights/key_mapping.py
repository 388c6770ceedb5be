"""From the keys of a checkpoint's files to the parameters of a model, by transformers' own rules.

`from_pretrained` renames keys, adds or strips the base model's prefix, and merges, splits or transposes tensors
(experts stored one by one become fused stacks). The same transforms are planned here and run later, a weight at a
time: first on the meta device, which gives names and shapes without reading, then on the values when they are needed.
Mirrors `transformers.core_model_loading.convert_and_load_state_dict_in_model` of transformers 5.23.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from condft.weights.safetensors_file import StoredTensor
from condft.weights.unit import DeferredWeight

__all__ = ["StoredWeights", "map_keys", "tied_names"]

_Sources = dict[str, list[StoredTensor]]


@dataclass
class StoredWeights:
    """Which parameters of a model the files of a checkpoint hold, and where.

    Attributes:
        deferred: Parameter name -> where its values are; a tied parameter under each of its names.
        quantized: Parameters stored in a quantized form -> the form.
        absent: Parameters that no file holds in the model's shape -> what was found instead.
        unused: Keys in the files that the model has no parameter for.
    """

    deferred: dict[str, DeferredWeight] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Group:
    """Stored tensors that are converted together, into one parameter or several.

    Attributes:
        name: The parameter, or the first of several.
        converter: transformers' WeightConverter, None if the tensor only changes its name.
        sources: Source pattern of the converter -> stored tensors in the order in which the loader collects them.
    """

    name: str
    converter: Any
    sources: _Sources = field(default_factory=dict)

    @property
    def tensors(self) -> list[StoredTensor]:
        return [tensor for tensors in self.sources.values() for tensor in tensors]

    def convert(self, values: dict[str, list[Tensor]], model: Any) -> dict[str, Tensor]:
        """Converts the values of the sources. `values` is emptied on the way, so that memory is freed early."""
        if self.converter is None:
            return {self.name: values.popitem()[1][0]}
        converter = copy.deepcopy(self.converter)  # a converter keeps the tensors that it was given
        while values:
            pattern = next(iter(values))
            for tensor in values.pop(pattern):
                converter.add_tensor(self.name, pattern, pattern, tensor)
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def map_keys(model: nn.Module, tensors: Mapping[str, StoredTensor], quantization: str | None = None) -> StoredWeights:
    """Finds every parameter of a transformers model in the files of a checkpoint. Reads no values.

    Args:
        model: A transformers model; its weights may be on the meta device. Their dtype is what they are read as.
        tensors: Key -> stored tensor, of all files.
        quantization: The quantization method that the checkpoint's config names, if any.

    Returns:
        Where each parameter is. Values equal those that `from_pretrained` would load, bit for bit.

    Raises:
        ValueError: Stored tensors that cannot be converted; the message names their file.
    """
    weights = StoredWeights()
    # A tied parameter under each of its names: the files may hold it under any of them.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = model.state_dict()  # with the buffers: files hold these too
    for group in _group_keys(model, expected, tensors, weights.unused):
        reason = _quantized_form(group, tensors, quantization)
        dtype = _dtype_for(model, group.name, expected[group.name].dtype)
        for name, deferred in _deferred_weights(group, model, dtype).items():
            if name not in parameters:
                continue  # a buffer
            if reason is not None and parameters[name].is_floating_point():
                weights.quantized[name] = reason
            elif deferred.shape != tuple(parameters[name].shape):
                weights.absent[name] = (
                    f"{group.tensors[0].file} holds it as {deferred.shape}, the model needs "
                    f"{tuple(parameters[name].shape)}"
                )
            else:
                weights.deferred[name] = deferred
    _complete(weights, model, quantization)
    return weights


def tied_names(model: nn.Module) -> list[list[str]]:
    """All names of each parameter of a model, in the order of its modules; more than one if it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _group_keys(
    model: Any, expected: Mapping[str, Tensor], tensors: Mapping[str, StoredTensor], unused: list[str]
) -> list[_Group]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    # In the loader's order, where 2 comes before 10: experts are stacked in the order in which they come.
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        # A rule may match a key that has the model's own name already. Then the prefix alone is adapted, as in the
        # loader (transformers 5.23).
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unused.append(key)
            continue
        group = groups.setdefault(name, _Group(name, by_pattern[pattern] if pattern else None))
        group.sources.setdefault(pattern or key, []).append(tensors[key])
    return list(groups.values())


def _deferred_weights(group: _Group, model: nn.Module, dtype: torch.dtype) -> dict[str, DeferredWeight]:
    """The parameters that a group makes, planned on the meta device."""
    meta = {
        pattern: [torch.empty(tensor.shape, dtype=dtype, device="meta") for tensor in tensors]
        for pattern, tensors in group.sources.items()
    }
    try:
        made = group.convert(meta, model)
    except (RuntimeError, ValueError, AttributeError) as error:
        files = ", ".join(sorted({str(tensor.file) for tensor in group.tensors}))
        raise ValueError(f"{files}: the tensors of {group.name} cannot be converted: {error}") from error
    return {
        name: DeferredWeight(
            tuple(value.shape),
            dtype,
            _reader(group, model, name, dtype),
            _slice_reader(group, model, name, dtype, tuple(value.shape)),
        )
        for name, value in made.items()
    }


def _reader(group: _Group, model: nn.Module, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Cast before the conversion, as the loader does.
        values = {p: [tensor.read().to(dtype) for tensor in tensors] for p, tensors in group.sources.items()}
        return group.convert(values, model)[name]

    return read


def _slice_reader(
    group: _Group, model: nn.Module, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[int], Tensor] | None:
    """Reads one expert of a stack, if only this expert's own stored tensors or slices are needed for it."""
    pick = _picker(group, shape)
    if pick is None:
        return None

    def read_slice(index: int) -> Tensor:
        values = {p: [pick(tensors, index).to(dtype)] for p, tensors in group.sources.items()}
        return group.convert(values, _OneExpert(model))[name].squeeze(0)

    return read_slice


def _picker(group: _Group, shape: tuple[int, ...]) -> Callable[[list[StoredTensor], int], Tensor] | None:
    from transformers.core_model_loading import MergeModulelist

    if len(shape) != 3:
        return None
    operations = [] if group.converter is None else group.converter.operations
    merged = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    # Without the merge itself (`merged` counts as 1), which only stacks what is stored one by one.
    if not all(map(_acts_within_experts, operations[merged:])):
        return None
    if merged:
        whole = all(len(tensors) == shape[0] for tensors in group.sources.values())
        return (lambda tensors, index: tensors[index].read()) if whole else None
    whole = all(len(tensors) == 1 and tensors[0].shape[:1] == shape[:1] for tensors in group.sources.values())
    return (lambda tensors, index: tensors[0].read_slice(index).unsqueeze(0)) if whole else None


def _acts_within_experts(operation: Any) -> bool:
    """Whether an operation on a stack treats each entry of the leading dimension alone."""
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, Split, Transpose

    if isinstance(operation, Transpose):
        return operation.dim0 > 0 and operation.dim1 > 0
    return isinstance(operation, Chunk | Concatenate | Interleave | Split) and operation.dim > 0


class _OneExpert:
    """The model as a converter of one expert must see it: its stacks hold one, since the converter compares shapes."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        parameter: Tensor = self._model.get_parameter(name)
        return parameter[:1]


def _dtype_for(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter after `from_pretrained(dtype="auto")`: the model's, or fp32 where the model says so."""
    for pattern, exception in model._get_dtype_plan(model.config.dtype).items():
        if re.search(pattern.replace("*", ".*"), name):
            return exception
    return dtype


def _quantized_form(group: _Group, tensors: Mapping[str, StoredTensor], quantization: str | None) -> str | None:
    """The quantized form of a group; None if the stored numbers are the weight itself."""
    for tensor in group.tensors:
        is_plain = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        has_scale = any(f"{tensor.key}{suffix}" in tensors for suffix in ("_scale_inv", "_scale"))
        if is_plain or (tensor.dtype.is_floating_point and not has_scale and quantization is None):
            continue  # float8 without a scale is a number format like any other
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{quantization or 'a scale next to it'}: stored as {dtype} in {tensor.file.name}"
    return None


def _complete(weights: StoredWeights, model: Any, quantization: str | None) -> None:
    """Gives every name of a tied parameter its values, and notes the parameters that no file holds."""
    # Parameters that the model makes itself: that no file holds them is no fault.
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for names in tied_names(model):
        source = next((name for name in names if name in weights.deferred), None)
        for name in names:
            if name in weights.deferred or name in weights.quantized or name in weights.absent:
                continue
            if source is not None:
                weights.deferred[name] = weights.deferred[source]
            elif quantization is not None:
                weights.quantized[name] = f"{quantization}: stored under other names"
            elif not any(pattern.search(name) for pattern in ignored):
                weights.absent[name] = "no file holds it"
