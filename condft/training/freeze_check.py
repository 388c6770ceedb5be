"""Proof of freeze: a checksum of every base tensor before and after, compared bit for bit.

`before` is taken over the plain composed model, `after` over the wrapped and trained one:

    before = checksum_tensors(frozen_tensors(model))
    model = get_peft_model(model, config)
    ...
    report = compare(before, checksum_tensors(frozen_tensors(model)))
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm.auto import tqdm

from condft.files.hashing import tensor_sha256
from condft.training.engines.sharding import whole
from condft.weights.walk import canonical_name


@dataclass(frozen=True)
class FreezeReport:
    """What became of the base tensors.

    Attributes:
        unchanged: All of them are there and none differs by a bit.
        checked: How many were compared.
        changed: Names whose checksum differs, sorted.
        missing: Names that were there before and are not now, sorted.
    """

    unchanged: bool
    checked: int
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the base model, wrapped by PEFT or not; not the adapter's own copies.

    `requires_grad` is not asked: it is True all over a freshly loaded model, and a base tensor that somebody
    unfroze in place is just what the comparison has to find. Tied tensors come under each of their names, so that a
    wrapper which changes the order of modules does not change the names.

    Yields:
        `(canonical name, tensor)`, in the model's order.
    """
    # a PEFT tuner tells the prefix of its own tensors ("lora_", "condft_"); a plain model has no tuner
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        parts = name.split(".")
        own = isinstance(prefix, str) and prefix and any(part.startswith(prefix) for part in parts)
        if not own and "modules_to_save" not in parts:
            yield canonical_name(name), tensor


def checksum_tensors(named_tensors: Iterable[tuple[str, Tensor]], *, progress: bool = True) -> dict[str, str]:
    """The checksum of each tensor by name.

    Sharded tensors (FSDP2, ZeRO-3) are gathered one at a time, so every rank has to call it.

    Raises:
        ValueError: A name comes twice, or a tensor is on the meta device.
    """
    checksums: dict[str, str] = {}
    for name, tensor in tqdm(list(named_tensors), desc="checksums", unit="tensor", disable=not progress, leave=False):
        if name in checksums:
            raise ValueError(f"two tensors have the name {name!r}: the comparison would not see one of them")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to check; load the weights first")
        checksums[name] = tensor_sha256(whole(tensor))
    return checksums


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> FreezeReport:
    """Compares two sets of checksums; tensors that only `after` has are no base tensors and do not matter.

    Raises:
        ValueError: `before` is empty: there is nothing to prove anything with.
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
