"""Units of one shape gathered for batched calls, on devices that one small matrix cannot keep busy."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from condft.spectra import batch_size
from condft.weights.unit import Unit

__all__ = ["left_after_batches"]

T = TypeVar("T")

# On the CPU threads do, see `condft.spectra.batched.facts`.
_BATCHED_ON = ("cuda",)


def left_after_batches(
    units: Iterable[Unit], together: Callable[[Sequence[Unit]], list[T]], done: Callable[[Unit, T], None]
) -> Iterator[Unit]:
    """Does the work of units that go in batches, as soon as one is full or no unit is left; yields all others.

    A unit goes in a batch for what it is, not for its company: also one whose shape no other has. Values of as many
    units as a batch holds are in memory together, of each shape that comes up.

    Args:
        units: With their values in memory.
        together: The work of units of one shape and dtype, on one device.
        done: Called with each of them and its result.
    """
    waiting: dict[object, list[Unit]] = {}

    def finish(batch: list[Unit]) -> None:
        for unit, result in zip(batch, together(batch), strict=True):
            done(unit, result)

    for unit in units:
        matrix = unit.matrix
        size = batch_size(tuple(matrix.shape), matrix.dtype) if matrix.device.type in _BATCHED_ON else 1
        if size == 1:
            yield unit
            continue
        key = (matrix.shape, matrix.dtype, matrix.device)
        waiting.setdefault(key, []).append(unit)
        if len(waiting[key]) == size:
            finish(waiting.pop(key))
    for batch in waiting.values():
        finish(batch)
