"""Units of one shape collected for batched calls, on devices that one small matrix cannot keep busy."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from condft.spectra import batch_size
from condft.weights.unit import Unit

__all__ = ["process_batches"]

T = TypeVar("T")

# On the CPU, threads are faster: see `condft.spectra.batched.facts`.
_BATCHED_ON = ("cuda",)


def process_batches(
    units: Iterable[Unit], batch_work: Callable[[Sequence[Unit]], list[T]], on_result: Callable[[Unit, T], None]
) -> Iterator[Unit]:
    """Does the work of all units that go in batches, and yields the others, which go one by one.

    A batch runs as soon as it is full; the rest runs when no unit is left. Until then its values stay in memory: of
    each shape, as many units as one batch holds.

    Args:
        units: With their values in memory.
        batch_work: The work of units of one shape and dtype, on one device.
        on_result: Called with each of these units and its result.
    """
    waiting: dict[object, list[Unit]] = {}

    def run(batch: list[Unit]) -> None:
        for unit, result in zip(batch, batch_work(batch), strict=True):
            on_result(unit, result)

    for unit in units:
        matrix = unit.matrix
        # The shape alone decides, not how many units have it. A unit's figures then do not depend on which others
        # are analyzed with it: batched routines round differently from the routine of a single matrix.
        size = batch_size(tuple(matrix.shape), matrix.dtype) if matrix.device.type in _BATCHED_ON else 1
        if size == 1:
            yield unit
            continue
        key = (matrix.shape, matrix.dtype, matrix.device)
        waiting.setdefault(key, []).append(unit)
        if len(waiting[key]) == size:
            run(waiting.pop(key))  # popped first, so that no reference outlives the batch
    for batch in waiting.values():
        run(batch)
