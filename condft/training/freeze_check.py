"""The freeze check: proves by checksums that training changed no bit of any base tensor.

before = checksum_tensors(frozen_tensors(model))                               # the plain model
model = get_peft_model(model, config)
...                                                                            # training
report = compare_checksums(before, checksum_tensors(frozen_tensors(model)))    # the wrapped model
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm.auto import tqdm

from condft.files.hashing import tensor_sha256
from condft.training.engines.sharding import whole
from condft.weights.walk import canonical_name

__all__ = ["FreezeReport", "checksum_tensors", "compare_checksums", "frozen_tensors"]


@dataclass(frozen=True)
class FreezeReport:
    """The result of a freeze check.

    Attributes:
        unchanged: Whether all base tensors are still there, and none differs in a bit.
        checked: Number of tensors that were compared.
        changed: Names of tensors with another checksum, sorted.
        missing: Names of tensors that no longer exist, sorted.

    >>> compare_checksums({"a": "01", "b": "02"}, {"a": "01", "b": "99"})
    FreezeReport(unchanged=False, checked=2, changed=['b'], missing=[])
    """

    unchanged: bool
    checked: int
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the base model, wrapped by PEFT or not, without the adapter's tensors.

    `requires_grad` is not used: all parameters of a newly loaded model have it, and a base tensor that was unfrozen
    by mistake is exactly what the comparison must find. Tied tensors appear under each of their names: if a wrapper
    changes the order of the modules, the names stay the same.

    Yields:
        `(canonical name, tensor)`, in the model's order.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig
    >>> before = [name for name, _ in frozen_tensors(base)]
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=3))
    >>> sorted(name for name, _ in frozen_tensors(model)) == sorted(before)
    True
    """
    # a PEFT tuner has the prefix of its own tensors ("lora_", "condft_"); a plain model has no tuner
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    # Buffers too: training mode updates some of them without a gradient (running statistics).
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        parts = name.split(".")
        adapter = isinstance(prefix, str) and prefix and any(part.startswith(prefix) for part in parts)
        # modules_to_save holds PEFT's trained copies. The originals, which PEFT keeps next to them, are checked.
        if not adapter and "modules_to_save" not in parts:
            yield canonical_name(name), tensor


def checksum_tensors(named_tensors: Iterable[tuple[str, Tensor]], *, progress: bool = True) -> dict[str, str]:
    """The SHA-256 (64 hex digits) of each tensor, by name.

    Collective where tensors are sharded (FSDP2, ZeRO-3), which are gathered one at a time: call it in every process.

    Raises:
        ValueError: A name occurs twice, or a tensor is on the meta device.

    >>> from torch import ones
    >>> checksums = checksum_tensors([("a", ones(2)), ("b", ones(2))], progress=False)
    >>> checksums["a"] == checksums["b"]
    True
    """
    checksums: dict[str, str] = {}
    for name, tensor in tqdm(list(named_tensors), desc="checksums", unit="tensor", disable=not progress, leave=False):
        if name in checksums:
            raise ValueError(f"two tensors have the name {name!r}: one of them would not be compared")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to check; load the weights first")
        # SHA-256 and not the faster XXH3 of fingerprints, because this is a proof.
        checksums[name] = tensor_sha256(whole(tensor))
    return checksums


def compare_checksums(before: Mapping[str, str], after: Mapping[str, str]) -> FreezeReport:
    """Compares checksums from before and after training. Tensors that only `after` has are ignored: no base tensors.

    Raises:
        ValueError: `before` is empty, so nothing would be compared.

    >>> before = checksum_tensors(frozen_tensors(base), progress=False)
    >>> base.model.norm.weight.data[0] += 1e-6  # one value of one tensor
    >>> compare_checksums(before, checksum_tensors(frozen_tensors(base), progress=False)).changed
    ['model.norm.weight']
    """
    if not before:
        raise ValueError("no checksums from before training: take them over the composed model before wrapping it")
    missing = sorted(before.keys() - after.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    return FreezeReport(
        unchanged=not missing and not changed,
        checked=len(before) - len(missing),
        changed=changed,
        missing=missing,
    )
