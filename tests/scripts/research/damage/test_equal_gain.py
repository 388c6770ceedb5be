"""Damage at equal gain, regressions and thirds."""

import numpy as np
import pytest

from scripts.research.damage.equal_gain import at_equal_gain, standardized_coefficients, thirds_ratio
from scripts.research.statistics import bootstrap_draws


def test_equal_gain_is_read_between_points_and_by_the_law_of_small_updates_outside() -> None:
    points = [(0.04, 0.016), (0.01, 0.001)]
    assert at_equal_gain(points, 0.02, power=2) == pytest.approx(0.004)
    assert at_equal_gain(points, 0.005, power=2) == pytest.approx(0.00025)
    assert at_equal_gain(points, 0.08, power=1) == pytest.approx(0.032)
    assert at_equal_gain([(0.01, -0.002), (0.03, 0.0)], 0.03, power=1) == pytest.approx(0.0)
    assert at_equal_gain([(-0.01, 0.5), (0.0, 0.1)], 0.01, power=2) is None


def test_coefficients_are_found_next_to_type_and_depth() -> None:
    generator = np.random.default_rng(0)
    groups = ["q"] * 100 + ["v"] * 100
    depth, scores = generator.uniform(size=200), generator.normal(size=(2, 200))
    target = 5 * np.array([group == "v" for group in groups]) + 3 * depth**2 + scores[0]
    first, second = standardized_coefficients(scores, target, depth, groups)
    assert first == pytest.approx(1 / np.sqrt(1 + 9 * np.var(depth**2)), rel=0.1)
    assert second == pytest.approx(0, abs=1e-6)


def test_the_third_of_lowest_score_is_compared_with_its_own_group() -> None:
    score, target = [1, 2, 3, 9, 8, 7], [1, 4, 16, 400, 1600, 100]
    assert thirds_ratio(score, target, list("aaabbb")) == pytest.approx(1 / 4)
    assert thirds_ratio([-value for value in score], target, list("aaabbb")) == pytest.approx(np.sqrt(4 * 1))


def test_many_draws_at_once_give_what_each_gives_alone() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], 20)
    x, y, depth = generator.normal(size=(3, 60))
    index = bootstrap_draws(groups, draws=5)
    at_once = [
        standardized_coefficients([x[index]], y[index], depth[index], groups)[0],
        thirds_ratio(x[index], np.exp(y[index]), groups),
    ]
    for one, drawn in enumerate(index):
        alone = [
            standardized_coefficients([x[drawn]], y[drawn], depth[drawn], groups)[0],
            thirds_ratio(x[drawn], np.exp(y[drawn]), groups),
        ]
        np.testing.assert_allclose([values[one] for values in at_once], alone)
