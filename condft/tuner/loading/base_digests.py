"""The base that an adapter belongs to: digests of the weights that it takes the place of, kept in its config.

An adapter holds absolute values. On another base of the same shapes they would act among weights that they were
never trained with, and nothing would show it. So the selected weights' digests are written into the config when the
adapter is made, and compared before it is put on a model. Only those weights are hashed: the selected share of the
model, as fast as memory is read.
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
    """A digest as the config keeps it: with the dtype that the weight had, such as `bfloat16 0f3a...`."""
    return f"{dtype} {digest}"


def digests_of_base(targets: Targets, units: Iterable[str]) -> dict[str, str]:
    """Unit -> `labeled` digest of its base values; without those whose values are not here as plain numbers."""
    found: dict[str, str] = {}
    for unit in units:
        values = _base_values(targets, unit)
        if values is not None:
            found[unit] = labeled(_name(values.dtype), tensor_digest(values))
    return found


def units_of_another_base(targets: Targets, recorded: Mapping[str, str]) -> list[str]:
    """The units that certainly have other values here than in the base that the adapter was made on.

    A weight that is here in another dtype is cast to the recorded one first. If that dtype holds less than this one
    (a bf16 base, loaded in fp32), the digests must agree still; if it holds more, the bits are lost and a difference
    says nothing. The same goes for weights that are quantized, sharded or on the meta device: they are not compared.

    Args:
        targets: The model.
        recorded: Unit -> `labeled` digest.
    """
    return [unit for unit, label in recorded.items() if _differs(_base_values(targets, unit), label)]


def check_base(targets: Targets, recorded: Mapping[str, str], base: str | None) -> None:
    """Compares the base that is here with the one that the adapter was made on, see `units_of_another_base`.

    Args:
        targets: The model.
        recorded: Unit -> `labeled` digest.
        base: Name of the base that the adapter was made on, for the message.

    Raises:
        ValueError: Weights that certainly have other values: names the first and says how many.
    """
    other = units_of_another_base(targets, recorded)
    if other:
        raise ValueError(
            f"the adapter was made on another base model ({base or 'unnamed'}): {len(other)} of the {len(recorded)} "
            f"weights that it replaces have other values here, the first is {other[0]!r}. Load that base, or, to put "
            "the adapter on this one all the same, set base_digests=None on its config and hand the config over: "
            "PeftModel.from_pretrained(model, adapter, config=config), or condft.load(..., check_base=False)."
        )


def _differs(values: Tensor | None, label: str) -> bool:
    if values is None:
        return False
    name, _, digest = label.partition(" ")
    dtype: torch.dtype = getattr(torch, name)
    holds_the_bits = torch.promote_types(values.dtype, dtype) == values.dtype
    return holds_the_bits and tensor_digest(values.to(dtype)) != digest


def _base_values(targets: Targets, unit: str) -> Tensor | None:
    """A unit's values in the base model, in the shape that the analysis hashes; None if they are not plainly here."""
    target = targets.find(unit)
    if not isinstance(target, Target):
        return None
    layer = targets.wrapper(target.path)
    owner_path, _, key = target.parameter.rpartition(".")
    owner: nn.Module = targets.module(target.path).get_submodule(owner_path)
    stored: Tensor = getattr(owner, key)
    sharded = is_dtensor(stored) or stored.numel() == 0  # a partition of DeepSpeed's has no entries
    if stored.is_meta or sharded or quantized_weight(owner, key, stored) is not None:
        return None
    values = stored.detach()
    if isinstance(layer, CondFTLayer) and target.parameter in layer.slices:
        values = layer.base_values(target.parameter)
    if target.slices is None:
        return values
    part = target.slices.take(values)
    return part[0] if values.ndim == 3 else part  # an expert is hashed as the matrix that it is


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
