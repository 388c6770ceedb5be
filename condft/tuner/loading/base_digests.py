"""The base model that an adapter belongs to: hashes of the weights that it replaces, kept in its config.

An adapter holds absolute values. On another base with the same shapes they would be combined with weights that they
were never trained with, and no error would show it. So the hashes of the selected weights are written into the config
when the adapter is made, and compared before it is put on a model. Only these weights are hashed, which takes about
as long as reading them from memory.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from condft.files.hashing import tensor_digest
from condft.tuner.layers.base import CondFTLayer
from condft.tuner.targets import Target, Targets
from condft.weights.quantized import quantized_weight
from condft.weights.shards import is_dtensor

__all__ = ["check_base", "digests_of_base", "labeled", "units_of_another_base"]


def labeled(dtype: str, digest: str) -> str:
    """A hash as the config keeps it, after the dtype that the weight had.

    >>> labeled("bfloat16", "0f3a")
    'bfloat16 0f3a'
    """
    return f"{dtype} {digest}"


def digests_of_base(targets: Targets, units: Iterable[str]) -> dict[str, str]:
    """Unit -> `labeled` hash of its base values. Without units whose values this process does not have as numbers."""
    found: dict[str, str] = {}
    for unit in units:
        values = _base_values(targets, unit)
        if values is not None:
            found[unit] = labeled(_name(values.dtype), tensor_digest(values))
    return found


def units_of_another_base(targets: Targets, recorded: Mapping[str, str]) -> list[str]:
    """The units that certainly have other values in this model than in the base that the adapter was made on.

    A weight that has another dtype in this model is cast to the recorded dtype first. If every value of the recorded
    dtype exists in this one (a bf16 base, loaded in fp32), the hashes must still agree. Otherwise bits were lost, and
    a difference means nothing. Weights that are quantized, sharded or on the meta device are not compared either.

    Args:
        targets: The model.
        recorded: Unit -> `labeled` hash.
    """
    return [unit for unit, label in recorded.items() if _differs(_base_values(targets, unit), label)]


def check_base(targets: Targets, recorded: Mapping[str, str], base: str | None) -> None:
    """Compares this model with the base that an adapter was made on; see `units_of_another_base`.

    Args:
        targets: The model.
        recorded: Unit -> `labeled` hash.
        base: Name of the base that the adapter was made on, for the message.

    Raises:
        ValueError: Weights that certainly have other values. The message has the first one's name and their number.
    """
    other = units_of_another_base(targets, recorded)
    if other:
        raise ValueError(
            f"the adapter was made on another base model ({base or 'unnamed'}): {len(other)} of the {len(recorded)} "
            f"weights that it replaces have other values here, the first is {other[0]!r}. Load that base. To put the "
            "adapter on this one nevertheless, use condft.load(..., check_base=False), or set base_digests=None on "
            "its config and pass that: PeftModel.from_pretrained(model, adapter, config=config)."
        )


def _differs(values: Tensor | None, label: str) -> bool:
    if values is None:
        return False
    name, _, digest = label.partition(" ")
    dtype: torch.dtype = getattr(torch, name)
    # Promotion gives the smallest dtype that holds both: it is this one only if this one holds all of the other.
    keeps_all_bits = torch.promote_types(values.dtype, dtype) == values.dtype
    return keeps_all_bits and tensor_digest(values.to(dtype)) != digest


def _base_values(targets: Targets, unit: str) -> Tensor | None:
    """A unit's values in the base model, in the shape that the analysis hashes.

    None if the unit does not exist, or if its values are quantized, sharded or on the meta device.
    """
    target = targets.find(unit)
    if not isinstance(target, Target):
        return None
    layer = targets.wrapper(target.path)
    owner_path, _, key = target.parameter.rpartition(".")
    owner: nn.Module = targets.module(target.path).get_submodule(owner_path)
    stored: Tensor = getattr(owner, key)
    sharded = is_dtensor(stored) or stored.numel() == 0  # outside of DeepSpeed's context a partition has no entries
    if stored.is_meta or sharded or quantized_weight(owner, key, stored) is not None:
        return None
    values = stored.detach()
    if isinstance(layer, CondFTLayer) and target.parameter in layer.slices:
        values = layer.base_values(target.parameter)  # without the adapter that may be merged into it
    if target.slices is None:
        return values
    part = target.slices.take(values)
    return part[0] if values.ndim == 3 else part  # the analysis hashes an expert as a matrix


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
