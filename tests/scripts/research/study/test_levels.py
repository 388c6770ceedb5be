"""Reading off at equal adaptation, and bootstrap ratios."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.research.study.levels import lowest_at_level, paired_ratio, ratio_across, value_at_level

finite = st.floats(-10, 10, allow_nan=False)
positive = st.floats(0.1, 10)
curves = st.lists(st.tuples(positive, finite), min_size=1, max_size=8)
seeds = st.lists(st.tuples(positive, positive), min_size=2, max_size=6)


def test_a_level_between_two_points_is_read_off_linearly() -> None:
    curve = [(4.0, 0.0), (2.0, 0.1), (1.0, 0.5)]
    assert value_at_level(curve, 3.0) == pytest.approx(0.05)
    assert value_at_level(curve, 1.25) == pytest.approx(0.4)
    assert value_at_level(curve, 2.0) == pytest.approx(0.1)
    assert value_at_level(curve, 0.9) is None
    assert value_at_level(curve, 5.0) == 0.0
    assert value_at_level([], 1.0) is None


def test_the_first_crossing_counts_where_the_loss_rises_again() -> None:
    assert value_at_level([(4.0, 0.0), (1.0, 3.0), (3.0, 4.0), (1.0, 9.0)], 2.0) == pytest.approx(2.0)


@given(curves, positive)
def test_a_value_lies_within_the_curve_and_is_there_when_the_loss_gets_there(
    curve: list[tuple[float, float]], level: float
) -> None:
    value = value_at_level(curve, level)
    assert (value is None) == (min(loss for loss, _ in curve) > level)
    if value is not None:
        heights = [height for _, height in curve]
        assert min(heights) - 1e-9 <= value <= max(heights) + 1e-9


@given(curves, positive, st.floats(0.5, 2))
def test_scaling_the_values_scales_what_is_read_off(
    curve: list[tuple[float, float]], level: float, factor: float
) -> None:
    value = value_at_level(curve, level)
    scaled = value_at_level([(loss, factor * height) for loss, height in curve], level)
    assert scaled == (None if value is None else pytest.approx(factor * value, abs=1e-9))


@given(seeds)
def test_a_ratio_lies_in_its_interval_and_is_that_of_the_means(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    ratio = paired_ratio(ours, theirs, draws=500)
    assert ratio.value == pytest.approx(sum(ours) / sum(theirs))
    smallest, largest = min(a / b for a, b in pairs), max(a / b for a, b in pairs)
    assert smallest - 1e-9 <= ratio.low <= ratio.high <= largest + 1e-9
    assert ratio.num_seeds == len(pairs)


@given(seeds, st.floats(0.25, 4))
def test_proportional_arms_have_a_ratio_without_spread(pairs: list[tuple[float, float]], factor: float) -> None:
    """Paired: what a seed does to both arms alike must not widen the interval."""
    theirs = [value for value, _ in pairs]
    ratio = paired_ratio([factor * value for value in theirs], theirs, draws=200)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((factor, factor, factor))


def test_an_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """Of 300 studies of 20 seeds; the percentile bootstrap is known to run a few percent short with few seeds."""
    generator = np.random.default_rng(0)
    covered = 0
    for study in range(300):
        theirs = generator.gamma(9.0, 1 / 9, size=20)
        ours = 0.5 * theirs * generator.gamma(25.0, 1 / 25, size=20)
        ratio = paired_ratio(ours.tolist(), theirs.tolist(), draws=400, seed=study)
        covered += ratio.low <= 0.5 <= ratio.high
    assert 0.88 <= covered / 300 <= 0.98


def test_one_seed_has_no_interval_and_a_denominator_about_zero_no_upper_end() -> None:
    single = paired_ratio([1.0], [2.0])
    assert single.value == 0.5
    assert math.isnan(single.low)
    assert math.isnan(single.effect_size)
    assert paired_ratio([1.0, 1.0, 1.0], [-0.5, 0.1, 1.0]).high == math.inf
    assert math.isnan(paired_ratio([1.0, 1.0], [-1.0, 0.0]).value)
    with pytest.raises(ValueError, match="one of each"):
        paired_ratio([1.0], [])


def test_the_effect_size_is_the_paired_difference_in_standard_deviations() -> None:
    assert paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).effect_size == pytest.approx(-2.0)


def test_the_rate_that_forgets_least_counts_at_every_level() -> None:
    slow, fast = [(4.0, 0.0), (2.0, 0.1)], [(4.0, 0.0), (1.0, 0.9)]
    assert lowest_at_level([slow, fast], 3.0) == pytest.approx(0.05)
    assert lowest_at_level([slow, fast], 1.5) == pytest.approx(0.75)
    assert math.isnan(lowest_at_level([slow, fast], 0.5))
    assert math.isnan(lowest_at_level([], 3.0))


@given(st.lists(st.lists(positive, min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0.25, 4))
def test_across_levels_proportional_arms_have_a_ratio_without_spread(theirs: list[list[float]], factor: float) -> None:
    across = ratio_across([[factor * value for value in level] for level in theirs], theirs, draws=50)
    expected = pytest.approx((factor,) * 5)
    assert (across.value, across.low, across.high, across.least, across.most) == expected
    assert (across.num_levels, across.num_seeds) == (len(theirs), (3, 3))


def test_a_seed_that_stops_short_counts_where_it_gets() -> None:
    """A step of the grid of rates at one level of three: the ratio there is told, and does not decide."""
    nan = math.nan
    across = ratio_across([[1.0, 2.0], [2.0, 4.0], [3.0, nan]], [[2.0, 4.0], [1.0, 2.0], [6.0, 5.0]])
    assert across.value == pytest.approx((0.5 * 2.0 * 0.5) ** (1 / 3))
    assert (across.least, across.most, across.num_levels, across.num_seeds) == (0.5, 2.0, 3, (1, 2))
    assert across.low <= across.value <= across.high
    gained = ratio_across([[1.0], [1.0]], [[-1.0], [2.0]])  # a level where the control's text gained has no ratio
    assert (gained.value, gained.num_levels) == (0.5, 1)
    assert math.isnan(gained.low)
    none = ratio_across([[nan, 1.0]], [[1.0, nan]])
    assert (none.num_levels, none.num_seeds) == (0, (0, 0))
    assert math.isnan(none.value)
    with pytest.raises(ValueError, match="of one shape"):
        ratio_across([[1.0]], [[1.0, 2.0]])
