"""What shape alone gives, against simulation and the laws themselves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq
from scipy.special import airy, iv

from condft.selection import random_matrix
from condft.selection.random_matrix import (
    EDELMAN_MEDIAN,
    edelman_cdf,
    expected_condition_number,
    expected_entropy_deficit,
    expected_log_volume,
    expected_stable_rank,
    marchenko_pastur_condition_number,
    marchenko_pastur_quantile,
    relative_condition_number,
)

sides = st.integers(1, 3000)


def spectra(shape: tuple[int, int], count: int) -> np.ndarray:
    """Singular values of `count` Gaussian matrices, `(count, n)` descending."""
    draws = np.random.default_rng(math.prod(shape)).standard_normal((count, min(shape), max(shape)))
    return np.sqrt(np.linalg.eigvalsh(draws @ draws.transpose(0, 2, 1))[:, ::-1])


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((2, 2), 4000),  # squares
        ((8, 8), 4000),
        ((64, 64), 800),
        ((8, 9), 4000),  # nearly square: no Marchenko-Pastur edge to speak of
        ((8, 10), 4000),
        ((16, 19), 2000),
        ((20, 16), 2000),
        ((64, 60), 400),
        ((64, 48), 100),  # rectangles
        ((192, 576), 10),
        ((2, 1000), 200),
    ],
)
def test_median_condition_number_agrees_with_simulation(shape, count):
    values = spectra(shape, count)
    median = float(np.median(values[:, 0] / values[:, -1]))
    assert expected_condition_number(*shape) == pytest.approx(median, rel=0.1)


@pytest.mark.parametrize(("shape", "count"), [((8, 8), 2000), ((64, 60), 100), ((48, 144), 30), ((5, 40), 1000)])
def test_whole_spectrum_figures_agree_with_simulation(shape, count):
    values = spectra(shape, count)
    log_volumes = np.log(values).mean(axis=1)
    deficits = 0.5 * np.log((values**2).mean(axis=1)) - log_volumes
    assert expected_log_volume(*shape) == pytest.approx(log_volumes.mean(), abs=0.02)
    assert expected_entropy_deficit(*shape) == pytest.approx(deficits.mean(), rel=0.05)
    stable_ranks = (values**2).sum(axis=1) / values[:, 0] ** 2
    assert expected_stable_rank(*shape) == pytest.approx(np.median(stable_ranks), rel=0.05)


def test_edelmans_median_solves_his_law():
    assert edelman_cdf(EDELMAN_MEDIAN) == pytest.approx(0.5, abs=1e-15)
    assert pytest.approx(3.6713, abs=5e-5) == EDELMAN_MEDIAN
    assert expected_condition_number(10**8, 10**8) == pytest.approx(EDELMAN_MEDIAN * 1e8, rel=1e-4)
    assert (edelman_cdf(0.0), edelman_cdf(math.inf)) == (0.0, 1.0)


def test_edelmans_law_is_that_of_square_matrices():
    values = spectra((48, 48), 1000)
    ratios = np.sort(values[:, 0] / values[:, -1]) / 48
    law = np.array([edelman_cdf(x) for x in ratios])
    assert np.abs(law - np.linspace(0, 1, len(ratios))).max() < 0.05  # Kolmogorov-Smirnov, 1 % at 0.0515


def test_rectangles_tend_to_the_marchenko_pastur_edges():
    assert marchenko_pastur_condition_number(192, 576) == pytest.approx(3.7321, abs=1e-4)
    assert marchenko_pastur_condition_number(7, 7) == math.inf
    for shape in [(10**7, 3 * 10**7), (10**6, 10**9)]:
        assert expected_condition_number(*shape) == pytest.approx(marchenko_pastur_condition_number(*shape), rel=1e-3)
    assert expected_condition_number(192, 576) < marchenko_pastur_condition_number(192, 576)  # edges are outermost


@pytest.mark.parametrize("shape", [(40, 40), (192, 576), (30, 3000)])
def test_marchenko_pastur_quantiles_integrate_the_density(shape):
    n, long = sorted(shape)
    low, high = (1 - math.sqrt(n / long)) ** 2, (1 + math.sqrt(n / long)) ** 2
    for probability in (0.01, 0.3, 0.5, 0.97):
        square = marchenko_pastur_quantile(probability, *shape) ** 2 / long
        # sigma^2 = x^2 takes the density's pole at the origin away.
        share, _ = quad(
            lambda x: 2 * math.sqrt(max((high - x * x) * (x * x - low), 0.0)) / (2 * math.pi * n / long * x),
            math.sqrt(low),
            math.sqrt(square),
        )
        assert share == pytest.approx(probability, abs=1e-6)


def test_marchenko_pastur_quantiles_are_a_random_spectrum():
    values = spectra((150, 250), 20).mean(axis=0)[::-1]
    quantiles = [marchenko_pastur_quantile((i + 0.5) / 150, 150, 250) for i in range(150)]
    assert quantiles == pytest.approx(list(values), rel=0.025)


@given(sides, sides, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_marchenko_pastur_quantiles_ascend_between_the_edges(rows, columns, p, q):
    n, long = sorted((rows, columns))
    low, high = (marchenko_pastur_quantile(x, rows, columns) for x in sorted((p, q)))
    assert math.sqrt(long) - math.sqrt(n) - 1e-6 <= low <= high <= math.sqrt(long) + math.sqrt(n) + 1e-6
    edges = [marchenko_pastur_quantile(x, rows, columns) for x in (0.0, 1.0)]
    assert edges == pytest.approx([math.sqrt(long) - math.sqrt(n), math.sqrt(long) + math.sqrt(n)], abs=1e-6)


def test_tracy_widom_median_from_painleve_two():
    """F_1 = exp(-1/2 int q + (s - x) q^2) with q'' = xq + 2q^3 (Tracy & Widom 1996)."""
    start = 8.0
    ai, slope, _, _ = airy(start)
    tails = [
        quad(weight, start, start + 10)[0]
        for weight in (
            lambda s: airy(s)[0] ** 2,
            lambda s: (s - start) * airy(s)[0] ** 2,
            lambda s: airy(s)[0],
        )
    ]
    path = solve_ivp(
        lambda x, y: [y[1], x * y[0] + 2 * y[0] ** 3, -(y[0] ** 2), -y[2], -y[0]],
        (start, -2.0),
        [ai, slope, *tails],
        rtol=1e-11,
        atol=1e-15,
        dense_output=True,
    ).sol
    median = brentq(lambda x: math.exp(-0.5 * (path(x)[3] + path(x)[4])) - 0.5, -2.0, 0.0)
    assert median == pytest.approx(random_matrix._TRACY_WIDOM_MEDIAN, abs=1e-6)


def test_hard_edge_medians_solve_their_laws():
    square, one, two, three = random_matrix._HARD_EDGE_MEDIANS
    assert math.exp(-square / 2 - math.sqrt(square)) == pytest.approx(0.5)
    assert math.exp(-one / 2) == pytest.approx(0.5)
    assert math.exp(-three / 2) * iv(1, 2 * math.sqrt(three)) / math.sqrt(three) == pytest.approx(0.5)
    parabola = np.polynomial.Polynomial.fit([0, 1, 3], np.sqrt([square, one, three]), 2)
    assert math.sqrt(two) == pytest.approx(parabola(2))


@given(sides, sides)
def test_transposition_changes_nothing_and_all_is_finite(rows, columns):
    for expected in (
        expected_condition_number,
        expected_stable_rank,
        expected_entropy_deficit,
        expected_log_volume,
    ):
        assert expected(rows, columns) == expected(columns, rows)
        assert math.isfinite(expected(rows, columns))
    assert expected_condition_number(rows, columns) >= 1.0
    assert 1.0 <= expected_stable_rank(rows, columns) <= min(rows, columns)
    assert 0.0 <= expected_entropy_deficit(rows, columns) < 0.7


@given(st.integers(2, 3000), st.integers(0, 3000))
def test_a_longer_matrix_is_better_conditioned(n, excess):
    """Across the seam between the hard edge and the soft one too."""
    assert expected_condition_number(n, n + excess + 1) < expected_condition_number(n, n + excess)


@given(sides, st.floats(1.0, 1e300))
def test_relative_condition_number_is_a_log_ratio(columns, kappa):
    relative = relative_condition_number(kappa, 40, columns)
    assert math.exp(relative) * expected_condition_number(40, columns) == pytest.approx(kappa, rel=1e-9)


def test_relative_condition_number_at_its_ends():
    assert relative_condition_number(1.0, 1, 5) == 0.0  # one singular value: kappa is 1 and nothing else
    assert relative_condition_number(math.inf, 4, 5) == math.inf
    assert relative_condition_number(expected_condition_number(30, 30), 30, 30) == 0.0


@pytest.mark.parametrize("kappa", [0.5, 0.0, -3.0, math.nan])
def test_no_condition_number_is_under_one(kappa):
    with pytest.raises(ValueError, match="at least 1, got"):
        relative_condition_number(kappa, 3, 3)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (-1, 3)])
@pytest.mark.parametrize("function", [expected_condition_number, marchenko_pastur_condition_number])
def test_empty_matrices_are_refused(function, shape):
    with pytest.raises(ValueError, match="at least one row and one column"):
        function(*shape)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_quantile_needs_a_probability(probability):
    with pytest.raises(ValueError, match="a probability lies in"):
        marchenko_pastur_quantile(probability, 3, 4)
