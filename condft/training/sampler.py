"""The order of the data: a pure function of (seed, epoch), the same for any number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_WINDOW = 16
"""Steps whose examples are sorted by length together: most of the padding goes, and an epoch is still well mixed."""


@dataclass(frozen=True)
class EpochSampler:
    """An endless sequence of epochs, each a permutation of the examples, cut into optimizer steps.

    With `lengths`, examples of similar length share a step, so that a batch has little padding: the epoch's random
    permutation is sorted by length within windows of 16 steps, and the steps of a window are shuffled again.

    Attributes:
        num_examples: Size of the training split.
        seed: Seed of the order.
        batch: Examples of one optimizer step: processes x micro-batches x per_device_batch_size.
        lengths: The length of each example in any unit, or None for no grouping.

    Raises:
        ValueError: There are no examples, or another number of lengths than of examples.

    >>> sampler = EpochSampler(num_examples=5, seed=0, batch=2)
    >>> sorted(sampler.epoch(0))
    [0, 1, 2, 3, 4]
    >>> sampler.step(0) == sampler.epoch(0)[:2]
    True
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
        # a run needs one epoch at a time, or two where a step reaches into the next one
        # On the instance, by object.__setattr__, because the dataclass is frozen.
        object.__setattr__(self, "_cached", lru_cache(maxsize=2)(self._permutation))

    def epoch(self, epoch: int) -> list[int]:
        """The order of the examples in epoch `epoch` (from 0): a permutation of `range(num_examples)`."""
        return self._cached(epoch).tolist()  # type: ignore[attr-defined]  # set in __post_init__

    def step(self, step: int) -> list[int]:
        """The examples of optimizer step `step` (from 0).

        They are the positions `step * batch` to `(step + 1) * batch - 1` of the sequence of epochs. A step may cross
        the end of an epoch, so no example is ever dropped.
        """
        indices: list[int] = []
        position, last = step * self.batch, (step + 1) * self.batch
        while position < last:
            epoch, offset = divmod(position, self.num_examples)
            indices += self.epoch(epoch)[offset : offset + last - position]
            position = step * self.batch + len(indices)
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        # A pair, not a sum: the seeds of two stages differ by 1, and a sum would repeat epochs of one in the other.
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_examples)
        if self.lengths is None:
            return order
        # The first examples of an epoch complete a step that began in the epoch before; grouping starts after them.
        head = -epoch * self.num_examples % self.batch
        lengths = np.asarray(self.lengths)
        pieces = [order[:head]]
        for start in range(head, self.num_examples, _WINDOW * self.batch):
            window = order[start : start + _WINDOW * self.batch]
            window = window[np.argsort(lengths[window], kind="stable")]  # stable: ties in the epoch's random order
            whole = len(window) // self.batch * self.batch
            steps = window[:whole].reshape(-1, self.batch)
            # The incomplete step comes last: the next epoch completes it.
            pieces += [generator.permutation(steps).reshape(-1), window[whole:]]
        return np.concatenate(pieces)


def iter_micro_batches(
    sampler: EpochSampler,
    *,
    start_step: int,
    steps: int,
    per_device_batch_size: int,
    process_index: int,
    num_processes: int,
) -> Iterator[list[int]]:
    """One process's micro-batches of the steps from `start_step` to `steps - 1`, in order.

    The global batch of a step is cut into micro-batches of `per_device_batch_size` examples, which are dealt to the
    processes in turn. So any division of the same global batch sees the same examples in a step.

    >>> sampler = EpochSampler(num_examples=8, seed=0, batch=4)
    >>> settings = {"start_step": 0, "steps": 1, "per_device_batch_size": 2, "num_processes": 2}
    >>> first, = iter_micro_batches(sampler, process_index=0, **settings)
    >>> second, = iter_micro_batches(sampler, process_index=1, **settings)
    >>> first + second == sampler.step(0)
    True
    """
    size = per_device_batch_size
    for step in range(start_step, steps):
        indices = sampler.step(step)
        for first in range(process_index * size, sampler.batch, num_processes * size):
            yield indices[first : first + size]
