"""The order of the data: a pure function of (seed, epoch), the same however many ranks share the work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_WINDOW = 16
"""Steps whose examples are sorted together: most of the padding goes, and an epoch is still thoroughly mixed."""


@dataclass(frozen=True)
class EpochSampler:
    """An endless sequence of epochs, each a permutation of the examples, cut into optimizer steps.

    With `lengths`, examples of like length share a step, so that a batch holds little padding: the epoch's random
    permutation is sorted by length within windows of 16 steps, and the steps of a window are shuffled again.

    Attributes:
        num_examples: Size of the training split.
        seed: Of the order.
        batch: The global batch of one step: ranks · micro-batches · per_device_batch_size.
        lengths: One number an example, or None for no grouping.
    """

    num_examples: int
    seed: int
    batch: int
    lengths: Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError("cannot order 0 examples: the training split is empty")
        if self.lengths is not None and len(self.lengths) != self.num_examples:
            raise ValueError(f"{len(self.lengths)} lengths for {self.num_examples} examples")
        # consecutive steps lie in one epoch, or reach into the next
        object.__setattr__(self, "_cached", lru_cache(maxsize=2)(self._permutation))

    def epoch(self, epoch: int) -> list[int]:
        """The permutation of `range(num_examples)` that epoch `epoch` (from 0) goes through."""
        return self._cached(epoch).tolist()  # type: ignore[attr-defined]  # set in __post_init__

    def step(self, step: int) -> list[int]:
        """The examples of optimizer step `step` (from 0).

        They are positions `[step·batch, (step+1)·batch)` of the sequence of epochs. A step may reach over the end of
        an epoch, so no example is ever dropped.
        """
        indices: list[int] = []
        position, last = step * self.batch, (step + 1) * self.batch
        while position < last:
            epoch, offset = divmod(position, self.num_examples)
            indices += self.epoch(epoch)[offset : offset + last - position]
            position = step * self.batch + len(indices)
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_examples)
        if self.lengths is None:
            return order
        # The first examples of an epoch complete a step that the epoch before began; grouping starts after them.
        head = -epoch * self.num_examples % self.batch
        lengths = np.asarray(self.lengths)
        pieces = [order[:head]]
        for start in range(head, self.num_examples, _WINDOW * self.batch):
            window = order[start : start + _WINDOW * self.batch]
            window = window[np.argsort(lengths[window], kind="stable")]
            whole = len(window) // self.batch * self.batch
            steps = window[:whole].reshape(-1, self.batch)
            pieces += [generator.permutation(steps).reshape(-1), window[whole:]]
        return np.concatenate(pieces)


def iter_micro_batches(
    order: EpochSampler,
    *,
    start_step: int,
    steps: int,
    per_device_batch_size: int,
    rank: int,
    num_ranks: int,
) -> Iterator[list[int]]:
    """One rank's micro-batches of the steps `start_step … steps - 1`, in order.

    The global batch of a step is cut into runs of `per_device_batch_size` examples, dealt to the ranks in turn; all
    ranks together, and any other division of the same global batch, see the same examples.
    """
    size = per_device_batch_size
    for step in range(start_step, steps):
        indices = order.step(step)
        for first in range(rank * size, order.batch, num_ranks * size):
            yield indices[first : first + size]
