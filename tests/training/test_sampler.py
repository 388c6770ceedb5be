"""Data order: epochs are permutations, ranks share them without overlap, any step can be started from."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.training.sampler import EpochSampler, iter_micro_batches

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
batches = st.integers(1, 12)


def lengths_of(num_examples: int, grouped: bool) -> list[int] | None:
    return [(7 * i) % 13 for i in range(num_examples)] if grouped else None


@given(sizes, seeds, batches, st.integers(0, 5), st.booleans())
def test_every_epoch_is_a_permutation(num_examples: int, seed: int, batch: int, epoch: int, grouped: bool) -> None:
    order = EpochSampler(num_examples, seed, batch, lengths_of(num_examples, grouped))
    assert sorted(order.epoch(epoch)) == list(range(num_examples))


@pytest.mark.parametrize("grouped", [False, True])
def test_epochs_and_seeds_differ(grouped: bool) -> None:
    orders = [EpochSampler(50, seed, 4, lengths_of(50, grouped)).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(sizes, seeds, batches, st.integers(1, 12), st.booleans())
def test_steps_run_through_the_epochs_without_a_gap(
    num_examples: int, seed: int, batch: int, steps: int, grouped: bool
) -> None:
    order = EpochSampler(num_examples, seed, batch, lengths_of(num_examples, grouped))
    dealt = [index for step in range(steps) for index in order.step(step)]
    epochs = [index for epoch in range(len(dealt) // num_examples + 1) for index in order.epoch(epoch)]
    assert dealt == epochs[: len(dealt)]


@pytest.mark.parametrize("num_examples", [512, 500])
def test_grouping_leaves_little_padding_in_every_epoch_and_mixes_the_lengths(num_examples: int) -> None:
    """Also where an epoch ends within a step, and without going from short to long."""
    lengths = [(37 * i) % 101 for i in range(num_examples)]
    waste, first = {}, []
    for grouped in (False, True):
        order = EpochSampler(num_examples, 3, 8, lengths if grouped else None)
        steps = [[lengths[i] for i in order.step(step)] for step in range(3 * num_examples // 8)]
        waste[grouped] = sum(max(step) * len(step) - sum(step) for step in steps) / sum(map(sum, steps))
        first = [sum(step) / len(step) for step in steps]
    assert waste[True] < 0.25 * waste[False]
    rises = sum(a < b for a, b in itertools.pairwise(first)) / (len(first) - 1)
    assert 0.35 < rises < 0.65


@given(sizes, seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4), st.booleans())
def test_ranks_and_micro_batches_deal_out_the_same_step(
    num_examples: int, seed: int, per_device: int, micro_batches: int, num_processes: int, start: int, grouped: bool
) -> None:
    steps, size = start + 2, per_device * micro_batches * num_processes
    order = EpochSampler(num_examples, seed, size, lengths_of(num_examples, grouped))
    shares = [
        list(
            iter_micro_batches(
                order,
                start_step=start,
                steps=steps,
                per_device_batch_size=per_device,
                process_index=rank,
                num_processes=num_processes,
            )
        )
        for rank in range(num_processes)
    ]
    for at, step in enumerate(range(start, steps)):
        own = [share[at * micro_batches : (at + 1) * micro_batches] for share in shares]
        assert all(len(batch) == per_device for share in own for batch in share)
        assert sorted(i for share in own for batch in share for i in batch) == sorted(order.step(step))


def test_bad_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="training split is empty"):
        EpochSampler(0, 0, 1)
    with pytest.raises(ValueError, match="3 lengths for 4 examples"):
        EpochSampler(4, 0, 1, [1, 2, 3])
