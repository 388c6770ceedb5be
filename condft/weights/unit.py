"""`Unit`: what is scored and trained as one, with its values in memory or loaded on demand.

Values that are elsewhere (in a file, in other processes, in a quantized form) are a `DeferredWeight`. A walk over a
model then costs no memory, and `load_ahead` loads the weights one after another: one is in use while the next is read.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from condft.report import Role

__all__ = ["DeferredWeight", "Unit", "load_ahead"]

_LARGE_BYTES = 256 * 2**20  # a weight from this size on is read alone: see `load_ahead`


def _unchanged(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, eq=False)
class DeferredWeight:
    """A weight whose values are read on demand.

    Attributes:
        shape: Of what `read` returns.
        dtype: Of what `read` returns.
        read: Reads the values into new memory at each call. Safe to call from another thread unless `collective`.
        read_slice: Reads only entry i of the leading dimension, without the others; None if that is not possible.
        collective: Reading is a collective operation of torch.distributed: all processes must read, in one order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_slice: Callable[[int], Tensor] | None = None
    collective: bool = False

    @property
    def stand_in(self) -> Tensor:
        """A tensor of this shape and dtype on the meta device, which takes no memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def slice(self, index: int) -> "DeferredWeight":
        """Entry `index` of the leading dimension as a weight of its own. Needs `read_slice`."""
        read_slice = self.read_slice
        assert read_slice is not None
        return DeferredWeight(self.shape[1:], self.dtype, lambda: read_slice(index), collective=self.collective)

    def to(self, dtype: torch.dtype) -> "DeferredWeight":
        """The same weight, cast when it is read."""
        if dtype == self.dtype:
            return self
        part = self.read_slice
        read_slice = None if part is None else lambda index: part(index).to(dtype)
        return DeferredWeight(self.shape, dtype, lambda: self.read().to(dtype), read_slice, self.collective)


@dataclass(frozen=True, eq=False)  # compared by identity: `==` of two tensors is no bool
class Unit:
    """One thing to score and, if chosen, to train.

    Attributes:
        name: Parameter name in the model without wrappers; `[i]` appended for slice i of a stack, `[h3]`, `[q3]`,
            `[k3]`, `[v3]` for an attention head (see `condft.weights.heads`).
        tensor: The unit's weight, in its own shape and dtype: a view of the model's memory, not a copy. On the meta
            device (shape and dtype only) if the values are deferred: `load` brings them.
        matrix: The same entries as the matrix to analyze: `(out, in * kernel)` for a convolution.
        module_type: Module path with layer indices replaced by `*`.
        role: What the unit is for.
        deferred: Where the values come from, if they are not in `tensor`.
        take: Takes this unit's part out of the values that `deferred` reads.
        quantization: The quantized form that the weight is stored in, empty if it is not quantized.
        rounding_error: Relative rounding error of that form, if it is known; see `condft.spectra.rounding_noise`.

    >>> from condft.weights import iter_units
    >>> unit = next(iter_units(base))
    >>> unit.name, unit.role.value, unit.matrix.shape
    ('model.embed_tokens.weight', 'embedding', torch.Size([96, 32]))
    >>> unit.load() is unit  # its values are in memory already
    True
    """

    name: str
    tensor: Tensor
    matrix: Tensor
    module_type: str
    role: Role
    deferred: DeferredWeight | None = None
    take: Callable[[Tensor], Tensor] = _unchanged
    quantization: str = ""
    rounding_error: float | None = None

    @property
    def collective(self) -> bool:
        """Whether loading is a collective operation that all processes must take part in."""
        return self.deferred is not None and self.deferred.collective

    def load(self) -> "Unit":
        """The unit with its values in memory: itself if they are there already."""
        return self if self.deferred is None else self.with_values(self.deferred.read())

    def with_values(self, values: Tensor) -> "Unit":
        """The unit with its part of `values`, which `deferred.read()` gave."""
        tensor = self.take(values)
        return replace(self, tensor=tensor, matrix=tensor.flatten(1), deferred=None, take=_unchanged)


def load_ahead(units: Iterable[Unit]) -> Iterator[Unit]:
    """Yields every unit with its values in memory; while one is in use, a thread reads the next.

    Consecutive units that are parts of one weight (heads, slices of a stack) are read together, once. Two weights are
    in memory at a time: the one in use (as long as the caller holds it) and the next. A large weight is not read
    ahead, and nothing is read while one is in use: a large weight and the work on it already set the peak of memory,
    and the work takes far longer than the reading.

    Args:
        units: In the order of use. In several processes the same collective units must come in the same order.

    Raises:
        ValueError: A file that changed or was cut off since it was opened.
    """
    # By identity: parts of one weight share its DeferredWeight. A list, since units without values take no memory.
    groups = [list(group) for _, group in groupby(units, key=lambda unit: id(unit.deferred or unit))]
    # One reader, so that no more than the next weight is in memory early.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="condft-read") as pool:
        following = _start(pool, groups[0]) if groups else None
        for index, group in enumerate(groups):
            values = _values(group[0], following)
            alone = any(_is_large(neighbors[0]) for neighbors in groups[index : index + 2])
            following = _start(pool, groups[index + 1]) if index + 1 < len(groups) and not alone else None
            for unit in group:
                yield unit if values is None else unit.with_values(values)
            del values  # the next turn of the loop waits for the next weight: this one must be gone by then


def _is_large(unit: Unit) -> bool:
    deferred = unit.deferred
    return deferred is not None and math.prod(deferred.shape) * deferred.dtype.itemsize > _LARGE_BYTES


def _start(pool: ThreadPoolExecutor, group: list[Unit]) -> Future[Tensor] | None:
    deferred = group[0].deferred
    # Collectives run in the caller's thread: from another one, their order among the caller's own would be random.
    return None if deferred is None or deferred.collective else pool.submit(deferred.read)


def _values(unit: Unit, reading: Future[Tensor] | None) -> Tensor | None:
    if reading is not None:
        return reading.result()
    return None if unit.deferred is None else unit.deferred.read()
