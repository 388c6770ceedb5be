"""The order of the data: a pure function of (seed, epoch), the same however many ranks share the work."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `range(num_examples)` that epoch `epoch` goes through.

    Raises:
        ValueError: There are no examples.
    """
    return _permutation(num_examples, seed, epoch).tolist()


def step_indices(num_examples: int, seed: int, step: int, batch: int) -> list[int]:
    """The examples of optimizer step `step`: positions `[step·batch, (step+1)·batch)` of the endless sequence of
    epochs. A step may reach over the end of an epoch, so no example is ever dropped.

    Args:
        num_examples: Size of the training split.
        seed: Of the order.
        step: From 0.
        batch: The global batch of one optimizer step: ranks · micro-batches · per_device_batch_size.

    Returns:
        `batch` indices into the training split.
    """
    indices: list[int] = []
    position, last = step * batch, (step + 1) * batch
    while position < last:
        epoch, offset = divmod(position, num_examples)
        indices += _permutation(num_examples, seed, epoch)[offset : offset + last - position].tolist()
        position = step * batch + len(indices)
    return indices


@lru_cache(maxsize=2)  # consecutive steps lie in one epoch, or reach into the next
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    if num_examples < 1:
        raise ValueError("cannot order 0 examples: the training split is empty")
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def iter_micro_batches(
    num_examples: int,
    seed: int,
    *,
    start_step: int,
    steps: int,
    per_device_batch_size: int,
    micro_batches: int,
    rank: int,
    num_ranks: int,
) -> Iterator[list[int]]:
    """One rank's micro-batches of the steps `start_step … steps - 1`, in order.

    The global batch of a step is cut into `micro_batches · num_ranks` runs of `per_device_batch_size` examples, dealt
    to the ranks in turn; all ranks together, and any other division of the same global batch, see the same examples.
    """
    size = per_device_batch_size
    for step in range(start_step, steps):
        indices = step_indices(num_examples, seed, step, size * micro_batches * num_ranks)
        for micro_batch in range(micro_batches):
            first = (micro_batch * num_ranks + rank) * size
            yield indices[first : first + size]
