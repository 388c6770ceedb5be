"""Data order: epochs are permutations, ranks share them without overlap, any step can be started from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.training.order import epoch_order, iter_micro_batches, step_indices

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


@given(sizes, seeds, st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_examples: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_examples, seed, epoch)) == list(range(num_examples))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(sizes, seeds, st.integers(1, 50), st.integers(1, 12))
def test_steps_run_through_the_epochs_without_a_gap(num_examples: int, seed: int, batch: int, steps: int) -> None:
    dealt = [index for step in range(steps) for index in step_indices(num_examples, seed, step, batch)]
    epochs = [
        index for epoch in range(len(dealt) // num_examples + 1) for index in epoch_order(num_examples, seed, epoch)
    ]
    assert dealt == epochs[: len(dealt)]


@given(sizes, seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_ranks_and_micro_batches_deal_out_the_same_step(
    num_examples: int, seed: int, per_device: int, micro_batches: int, num_ranks: int, start: int
) -> None:
    steps, size = start + 2, per_device * micro_batches * num_ranks
    shares = [
        list(
            iter_micro_batches(
                num_examples,
                seed,
                start_step=start,
                steps=steps,
                per_device_batch_size=per_device,
                micro_batches=micro_batches,
                rank=rank,
                num_ranks=num_ranks,
            )
        )
        for rank in range(num_ranks)
    ]
    for at, step in enumerate(range(start, steps)):
        dealt = [
            i for share in shares for batch in share[at * micro_batches : (at + 1) * micro_batches] for i in batch
        ]
        assert sorted(dealt) == sorted(step_indices(num_examples, seed, step, size))


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="training split is empty"):
        epoch_order(0, 0, 0)
