"""An adapter's update as a difference, `trained - base`: a plain state dict, a safetensors file, weighted sums.

Differences, and not the trained values, because differences can be weighted and added. They are exact for almost every
weight: `trained - base` has no rounding error in fp32 if trained/base lies in [1/2, 2] (Sterbenz' lemma), and then
`base + difference` is the trained value bit for bit. Elsewhere the error is at most one rounding of the larger of the
two. For the exact bits everywhere use the adapter, which holds the trained values (`merge_and_unload`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from condft.files.atomic import atomic_path
from condft.files.hashing import tensor_digest
from condft.tuner.export.updates import Update, iter_updates
from condft.tuner.layers.base import CondFTLayer
from condft.tuner.loading.load import adapted
from condft.weights.names import canonical_name

__all__ = ["Delta", "DeltaTensor", "apply_delta", "combine_deltas", "export_delta"]

_METADATA_KEY = "condft_delta"
_VERSION = 1
_INDEX = "#index"


# eq=False, since `==` of two tensors is a tensor and no answer.
@dataclass(frozen=True, eq=False)
class DeltaTensor:
    """The difference of one parameter. Entries of one dimension that do not train are left out.

    Attributes:
        values: The difference; if `index` is given, only these entries of dimension `dim`.
        shape: The parameter's shape.
        base_dtype: The base parameter's dtype, such as "bfloat16".
        base_digest: `condft.files.hashing.tensor_digest` of the base parameter.
        dim: Dimension that `index` counts in.
        index: The entries along `dim` that were trained (experts of a stack, token rows, heads), int64, ascending;
            None for all.
    """

    values: Tensor
    shape: tuple[int, ...]
    base_dtype: str
    base_digest: str
    dim: int = 0
    index: Tensor | None = None

    def dense(self) -> Tensor:
        """The difference in the parameter's whole shape, zero where nothing trains."""
        if self.index is None:
            return self.values
        return self.values.new_zeros(self.shape).index_copy_(self.dim, self.index, self.values)


@dataclass(frozen=True, eq=False)
class Delta:
    """The change that an adapter makes to its base model. Made by `export_delta` and `combine_deltas`.

    Attributes:
        tensors: Parameter name in the base model -> its difference.
        base_model: Name or path of the base model, for people. `apply_delta` compares hashes of the weights instead.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, Delta, export_delta
    >>> units = ["model.layers.1.mlp.down_proj.weight"]
    >>> delta = export_delta(get_peft_model(base, CondFTConfig(target_units=units)))
    >>> {name: tuple(tensor.shape) for name, tensor in delta.state_dict().items()}
    {'model.layers.1.mlp.down_proj.weight': (32, 64)}
    >>> delta.save("delta.safetensors")
    >>> Delta.load("delta.safetensors").tensors.keys() == delta.tensors.keys()
    True
    """

    tensors: Mapping[str, DeltaTensor] = field(default_factory=dict)
    base_model: str | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The differences as a plain state dict with the base model's names and shapes."""
        return {name: tensor.dense() for name, tensor in self.tensors.items()}

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file, atomically. Its metadata holds names, shapes, dtypes and hashes of the base."""
        stored: dict[str, Tensor] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            stored[name] = tensor.values.contiguous()  # safetensors refuses other layouts
            rows[name] = {"shape": tensor.shape, "base_dtype": tensor.base_dtype, "base_digest": tensor.base_digest}
            if tensor.index is not None:
                stored[name + _INDEX] = tensor.index
                rows[name]["dim"] = tensor.dim
        header = {"version": _VERSION, "base_model": self.base_model, "tensors": rows}
        with atomic_path(file) as temporary:
            save_file(stored, temporary, metadata={"format": "pt", _METADATA_KEY: json.dumps(header)})

    @classmethod
    def load(cls, file: str | Path) -> "Delta":
        """Reads a file that `save` wrote, onto the CPU.

        Raises:
            ValueError: The file is damaged, has another version, or is not a difference.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no iterator)
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or no safetensors file ({error}): export it again") from error
        if _METADATA_KEY not in metadata:
            raise ValueError(f"{file} holds no difference: it lacks the metadata that export_delta writes")
        header = json.loads(metadata[_METADATA_KEY])
        if header["version"] != _VERSION:
            raise ValueError(f"{file} has version {header['version']}, this condft reads {_VERSION}: update condft")
        tensors: dict[str, DeltaTensor] = {}
        for name, row in header["tensors"].items():
            index = stored.get(name + _INDEX)
            described = (tuple(row["shape"]), row["base_dtype"], row["base_digest"], row.get("dim", 0), index)
            tensors[name] = DeltaTensor(stored[name], *described)
        return cls(tensors, header["base_model"])


def export_delta(
    model: nn.Module | str | Path,
    file: str | Path | None = None,
    *,
    base: nn.Module | str | Path | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
) -> Delta:
    """The update `trained - base` of everything that an adapter trains, including saved modules and token rows.

    Args:
        model: A model with the adapter, or the adapter's folder (or hub id).
        file: A safetensors file to write the difference to; None only returns it.
        base: For a folder: the base model, or its folder or hub id; by default the one that the adapter's config
            names. A model that is passed has no adapter afterwards.
        adapter_name: Which adapter of a model; a folder holds one.
        dtype: The dtype of the difference. By default fp32, or the wider dtype if one of the two is wider.

    Returns:
        The difference, on the CPU.

    Raises:
        ValueError: The model has no such adapter, an adapter is merged, or weights are sharded.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, export_delta
    >>> model = get_peft_model(base, CondFTConfig(target_units=["model.layers.1.mlp.down_proj.weight"]))
    >>> model(input_ids=token_ids, labels=token_ids).loss.backward()
    >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
    >>> delta = export_delta(model, "delta.safetensors")
    >>> delta.tensors["model.layers.1.mlp.down_proj.weight"].values.abs().max() > 0
    tensor(True)
    """
    with adapted(model, base, adapter_name) as live:
        tensors = {update.name: _difference(update, dtype) for update in iter_updates(live, adapter_name)}
        config = getattr(live, "peft_config", {}).get(adapter_name)
        delta = Delta(tensors, getattr(config, "base_model_name_or_path", None))
    if file is not None:
        delta.save(file)
    return delta


def combine_deltas(deltas: Sequence[Delta | str | Path], weights: Sequence[float]) -> Delta:
    """The weighted sum of differences to one base model. So it merges adapters, also of different weights.

    Args:
        deltas: Differences, or their files.
        weights: One factor each.

    Returns:
        `sum(weight * delta)` in the widest of their dtypes. A weight that a difference lacks counts as unchanged.

    Raises:
        ValueError: The numbers of weights and of differences differ or are zero, or two differences have different
            bases.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, combine_deltas, export_delta
    >>> model = get_peft_model(base, CondFTConfig(target_units=["model.layers.0.mlp.up_proj.weight"]), "german")
    >>> model.add_adapter("speech", CondFTConfig(target_units=["model.layers.1.mlp.up_proj.weight"]))
    >>> deltas = [export_delta(model, adapter_name=name) for name in ("german", "speech")]
    >>> sorted(combine_deltas(deltas, [0.5, 1.0]).tensors)
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    if len(deltas) != len(weights) or not deltas:
        raise ValueError(f"{len(deltas)} differences need as many weights, at least one; got {len(weights)}")
    summed: dict[str, DeltaTensor] = {}
    loaded = [_loaded(delta) for delta in deltas]
    for delta, weight in zip(loaded, weights, strict=True):
        for name, tensor in delta.tensors.items():
            scaled = replace(tensor, values=weight * tensor.values)
            summed[name] = _sum(name, summed[name], scaled) if name in summed else scaled
    return Delta(summed, loaded[0].base_model)


def apply_delta(model: nn.Module, delta: Delta | str | Path, weight: float = 1.0) -> nn.Module:
    """Adds `weight * delta` to the base model's weights in place, rounded once to the weights' dtype.

    Args:
        model: The base model, with the weights that the difference was made from. All of them are checked before the
            first is changed, so a second difference no longer fits: add them with `combine_deltas` first.
        delta: The difference, or its file.
        weight: 1.0 gives the trained model, 0.5 the model halfway between base and trained.

    Returns:
        The same model.

    Raises:
        ValueError: The model has an adapter, or other weights than the difference's base. The message has the first
            tensor that differs and their number.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, apply_delta, export_delta
    >>> base.save_pretrained("base")
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=2, init_weights=False))
    >>> delta = export_delta(model, "delta.safetensors")
    >>> plain = apply_delta(base.from_pretrained("base"), "delta.safetensors")
    >>> torch.allclose(plain(token_ids).logits, model(token_ids).logits, atol=1e-5)
    True
    """
    delta = _loaded(delta)
    if any(isinstance(module, CondFTLayer) for module in model.modules()):
        raise ValueError("the model has an adapter: apply the difference to the base model, model.unload()")
    # A tied weight is found under each of its names.
    parameters = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    # All tensors before the first write, so that a refusal leaves the model as it was.
    _check_base(parameters, delta)
    with torch.no_grad():
        for name, tensor in delta.tensors.items():
            parameter = parameters[name]
            wide = torch.promote_types(parameter.dtype, tensor.values.dtype)
            # Added in the wider dtype, and rounded once by copy_.
            parameter.copy_(parameter.to(wide) + weight * tensor.dense().to(parameter.device, wide))
    return model


def _difference(update: Update, dtype: torch.dtype | None) -> DeltaTensor:
    values = update.difference()
    # At once, so that one difference at a time is in the device's memory.
    values = values.to("cpu", dtype or values.dtype)
    base_dtype = str(update.base.dtype).removeprefix("torch.")
    whole = DeltaTensor(values, tuple(update.base.shape), base_dtype, tensor_digest(update.base))
    if update.slices is None:
        return whole
    return replace(whole, dim=update.slices.dim, index=torch.tensor(update.slices.indices))


def _sum(name: str, one: DeltaTensor, other: DeltaTensor) -> DeltaTensor:
    if (one.base_digest, one.shape) != (other.base_digest, other.shape):
        raise ValueError(f"the differences were made from different bases: {name} differs between them")
    if one.index is None or other.index is None or one.dim != other.dim:
        # One index cannot describe rows and columns at the same time, so the sum is dense.
        return replace(one, values=one.dense() + other.dense(), index=None)
    union = torch.cat([one.index, other.index]).unique()  # it sorts: `index` is ascending
    values = sum(t.dense().index_select(one.dim, union) for t in (one, other))
    assert isinstance(values, Tensor)
    return replace(one, values=values, index=union)


def _check_base(parameters: Mapping[str, Tensor], delta: Delta) -> None:
    problems = [problem for name, tensor in delta.tensors.items() if (problem := _misfit(name, tensor, parameters))]
    if problems:
        raise ValueError(
            f"the difference is of another base model ({delta.base_model or 'unnamed'}): {len(problems)} of "
            f"{len(delta.tensors)} tensors differ, the first is {problems[0]}"
        )


def _misfit(name: str, tensor: DeltaTensor, parameters: Mapping[str, Tensor]) -> str | None:
    parameter = parameters.get(name)
    if parameter is None:
        return f"{name}: absent in the model"
    if tuple(parameter.shape) != tensor.shape:
        shapes = ("x".join(map(str, shape)) for shape in (parameter.shape, tensor.shape))
        return "{}: {} in the model, {} in the difference".format(name, *shapes)
    dtype = str(parameter.dtype).removeprefix("torch.")
    # Before the hash, which is of the bytes: it would differ too, but not say why.
    if dtype != tensor.base_dtype:
        return f"{name}: {dtype} in the model, {tensor.base_dtype} in the difference (load the base in that dtype)"
    return None if tensor_digest(parameter) == tensor.base_digest else f"{name}: other values"


def _loaded(delta: Delta | str | Path) -> Delta:
    return delta if isinstance(delta, Delta) else Delta.load(delta)
