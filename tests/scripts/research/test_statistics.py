"""Rank correlations, shares of variance and bootstrap intervals, and that they are scipy's where scipy has them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scripts.research.statistics import (
    bootstrap_draws,
    explained_by_chance,
    explained_by_groups,
    mean_interval,
    partial_rank_correlation,
    percentile_interval,
    rank_correlation,
    ratio_draws,
    spread_within,
)

pairs = st.lists(st.tuples(st.floats(-10, 10), st.integers(-3, 3)), min_size=3, max_size=30)


@given(pairs)
def test_the_rank_correlation_is_scipys(values: list[tuple[float, int]]) -> None:
    """Ties included: the second side has many."""
    x, y = zip(*values, strict=True)
    ours = float(rank_correlation(x, y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_within_groups_of_one_size_it_is_the_mean_of_scipys() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 3, 12))
    groups = np.repeat(["a", "b", "c"], 12)
    theirs = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert float(rank_correlation(x.ravel(), y.ravel(), groups)) == pytest.approx(np.mean(theirs))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_the_interval_of_a_mean_is_that_of_plain_draws(values: list[float]) -> None:
    """scipy draws what numpy's generator draws by the same seed: committed figures stay."""
    array = np.array(values)
    index = np.random.default_rng(0).integers(len(array), size=(500, len(array)))
    expected = np.quantile(array[index].mean(axis=1), [0.025, 0.975])
    assert mean_interval(values, draws=500)[1:] == pytest.approx(tuple(expected), abs=1e-12)


def test_draws_of_a_ratio_are_those_of_plain_draws_and_infinite_without_a_denominator() -> None:
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([-3.0, 1.0, 2.0])
    index = np.random.default_rng(7).integers(3, size=(200, 3))
    top, bottom = ours[index].mean(axis=1), theirs[index].mean(axis=1)
    expected = [a / b if b > 0 else math.inf for a, b in zip(top, bottom, strict=True)]
    np.testing.assert_allclose(ratio_draws(ours, theirs, draws=200, seed=7), expected)


def test_many_draws_at_once_give_what_each_gives_alone() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], 20)
    x, y, depth = generator.normal(size=(3, 60))
    index = bootstrap_draws(groups, draws=5)
    at_once = [
        rank_correlation(x[index], y[index], groups),
        partial_rank_correlation(x[index], y[index], [depth[index]], groups),
    ]
    for one, drawn in enumerate(index):
        alone = [
            rank_correlation(x[drawn], y[drawn], groups),
            partial_rank_correlation(x[drawn], y[drawn], [depth[drawn]], groups),
        ]
        np.testing.assert_allclose([values[one] for values in at_once], alone)


def test_ranks_within_groups_ignore_what_sets_groups_apart() -> None:
    x, y = [1, 2, 3, 101, 102, 103], [13, 12, 11, 93, 92, 91]
    assert rank_correlation(x, y) > 0.5
    assert rank_correlation(x, y, list("aaabbb")) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_a_partial_correlation_takes_out_what_the_covariate_explains() -> None:
    generator = np.random.default_rng(0)
    depth = generator.normal(size=400)
    x, y = depth + 0.3 * generator.normal(size=400), depth + 0.3 * generator.normal(size=400)
    assert rank_correlation(x, y) > 0.8
    assert abs(partial_rank_correlation(x, y, [depth])) < 0.15
    assert partial_rank_correlation(x, x + y, [depth]) > 0.5


def test_draws_stay_in_their_group_and_repeat() -> None:
    groups = ["b", "a"] * 30
    draws = bootstrap_draws(groups, draws=50)
    assert (np.asarray(groups)[draws] == np.asarray(groups)).all()
    assert (draws == bootstrap_draws(groups, draws=50)).all()
    assert len(np.unique(draws[0])) < 60


def test_the_interval_leaves_out_draws_without_a_value() -> None:
    low, high = percentile_interval([*range(101), math.nan])
    assert (low, high) == (2.5, 97.5)
    assert all(math.isnan(end) for end in percentile_interval([math.nan]))


def test_variance_explained_is_one_zero_or_chance() -> None:
    groups = np.repeat(np.arange(4), 25)
    assert explained_by_groups(groups * 2.0, groups) == pytest.approx(1.0)
    assert explained_by_groups(np.tile([0.0, 1.0, 2.0, 3.0, 4.0], 20), groups) == pytest.approx(0.0)
    assert math.isnan(explained_by_groups(np.ones(100), groups))
    generator = np.random.default_rng(0)
    noise = [explained_by_groups(generator.normal(size=100), groups) for _ in range(500)]
    assert np.mean(noise) == pytest.approx(explained_by_chance(groups), rel=0.1)


def test_spread_within_groups_leaves_out_their_means() -> None:
    groups = np.repeat(np.arange(50), 10)
    values = np.random.default_rng(0).normal(scale=2.0, size=500) + 100.0 * groups
    assert spread_within(values, groups) == pytest.approx(2.0, rel=0.1)


def test_the_interval_of_a_mean() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert 1.0 <= low < 2.5 < high <= 4.0
    assert math.isnan(mean_interval([1.0])[1])
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
