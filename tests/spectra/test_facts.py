"""Spectral facts against NumPy's fp64 SVD: every route, every dtype, planted and random spectra."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condft import report
from condft.spectra import condition_number, condition_number_bound, spectral_facts
from condft.spectra.facts import BOUND_FROM
from tests.helpers.planted import planted, random_matrix, reference

SMALL = [(1, 1), (1, 7), (7, 1), (5, 5), (40, 12), (12, 40)]
SHAPES = [(150, 150), (64, 200), (200, 64), (900, 60), (300, 300), (300, 280), (290, 700), (270, 400)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SMALL + SHAPES)
@pytest.mark.parametrize("kappa", [1.0, 3.0, 1e3, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_agrees_with_numpy_on_planted_spectra(shape, kappa, spacing):
    n = min(shape)
    spectrum = np.geomspace(kappa, 1.0, n) if spacing == "geometric" else np.linspace(kappa, 1.0, n)
    matrix = planted(shape, spectrum if n > 1 else np.array([kappa]))
    values = reference(matrix)
    # Where the SVD reads the planted spectrum back only to its own rounding, nothing can be compared more closely.
    rtol = max(1e-3 if kappa <= 1e6 else 1e-2, 1e-14 * kappa)
    for measures in ("basic", "all"):
        facts = spectral_facts(matrix, measures=measures)
        assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=rtol), (measures, facts.method)
        assert facts.sigma_max == pytest.approx(values[0], rel=1e-3)
        assert facts.frobenius_norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert facts.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=2e-3)
    assert facts.log_volume == pytest.approx(np.log(values).sum(), abs=1e-6 * n * max(1.0, 1e-8 * kappa))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_numpy_on_random_matrices_of_every_dtype(shape, dtype, seed):
    matrix = random_matrix(shape, seed).to(dtype)
    values = reference(matrix)
    facts = spectral_facts(matrix)
    assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=1e-3), facts.method


def test_small_matrices_are_exact():
    """1e-6 and better up to n = 48, where all singular values are computed."""
    for shape in SMALL:
        values = reference(random_matrix(shape))
        facts = spectral_facts(random_matrix(shape), measures="all")
        assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=1e-9)
        assert facts.log_volume == pytest.approx(np.log(values).sum(), rel=1e-9, abs=1e-9)


@settings(max_examples=60)
@given(
    st.sampled_from([(300, 270), (700, 270), (270, 270), (120, 120), (300, 64), (64, 20), (40, 40)]),
    st.floats(0.0, 14.5),
)
def test_the_vouched_error_holds_and_past_a_hundredth_the_figure_is_a_lower_bound(shape, decades):
    n = min(shape)
    spectrum = np.geomspace(10.0**decades, 1.0, n)
    facts = spectral_facts(planted(shape, spectrum))
    exact = 10.0**decades
    # Planting itself rounds: the stored matrix's smallest singular value is off by some eps * sigma_1.
    planting = 8 * np.sqrt(max(shape)) * 2.2e-16 * exact
    if facts.is_lower_bound:
        assert facts.condition_number <= exact * (1 + planting)
    elif math.isfinite(facts.condition_number):
        assert facts.relative_error <= 1e-2
        assert facts.condition_number == pytest.approx(exact, rel=facts.relative_error + planting)
    else:
        assert exact * max(shape) * 2.2e-16 > 0.5


def test_is_lower_bound_is_the_same_rule_in_facts_and_rows():
    facts = spectral_facts(planted((120, 120), np.geomspace(3e12, 1.0, 120)))
    assert facts.is_lower_bound
    assert not dataclasses.replace(facts, relative_error=1e-3).is_lower_bound
    assert not dataclasses.replace(facts, condition_number=math.inf).is_lower_bound
    assert report.BOUND_FROM == BOUND_FROM


@pytest.mark.parametrize("shape", [(96, 60), (60, 96), (64, 64), (9, 4)])
def test_the_whole_spectrum_on_request(shape):
    matrix = random_matrix(shape) * 2.0**20
    facts = spectral_facts(matrix, spectrum=True)
    np.testing.assert_allclose(facts.spectrum, reference(matrix), rtol=1e-6)
    assert spectral_facts(matrix).spectrum is None
    assert spectral_facts(torch.zeros(shape), spectrum=True).spectrum == (0.0,) * min(shape)


def test_equal_singular_values_are_perfectly_conditioned_and_lose_no_entropy():
    for shape in ((30, 10), (200, 80), (80, 80)):
        facts = spectral_facts(planted(shape, np.full(min(shape), 7.0)), measures="all")
        assert facts.condition_number == pytest.approx(1.0, abs=1e-6)
        assert facts.entropy_deficit == pytest.approx(0.0, abs=1e-6)
        assert facts.stable_rank == pytest.approx(min(shape))


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12), st.integers(0, 1000))
def test_entropy_deficit_is_never_negative_and_bounded_below_by_kappa(spectrum, seed):
    """Two ends alone already lose log((κ + 1/κ) / 2): the other values can only add to it."""
    values = np.sort(np.array(spectrum))[::-1]
    facts = spectral_facts(planted((len(values) + 3, len(values)), values, seed), measures="all")
    kappa = facts.condition_number
    assert facts.entropy_deficit >= math.log((kappa + 1 / kappa) / 2) - 1e-9


@settings(max_examples=40)
@given(
    st.integers(-40, 40),
    st.sampled_from([*SMALL, (150, 150), (64, 200), (200, 64), (130, 120)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_powers_of_two_change_nothing_but_the_scale(power, shape, dtype):
    matrix = random_matrix(shape, 3).to(dtype)
    for measures in ("basic", "all"):
        plain, scaled = (spectral_facts(m, measures=measures) for m in (matrix, matrix * 2.0**power))
        assert scaled.condition_number == plain.condition_number
        assert scaled.stable_rank == plain.stable_rank
        assert scaled.sigma_min == math.ldexp(plain.sigma_min, power)
        assert scaled.frobenius_norm == math.ldexp(plain.frobenius_norm, power)
        if measures == "all":
            assert scaled.entropy_deficit == pytest.approx(plain.entropy_deficit, rel=1e-9)


@given(st.floats(1e-30, 1e30), st.booleans())
def test_any_factor_leaves_kappa_to_rounding(factor, negative):
    matrix = planted((9, 6), np.geomspace(50.0, 1.0, 6))
    factor = -factor if negative else factor
    assert condition_number(matrix * factor) == pytest.approx(condition_number(matrix), rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 17), (64, 200), (900, 60), (150, 150)])
def test_transposition_changes_nothing_but_rounding(shape):
    matrix = random_matrix(shape, 4)
    one, other = spectral_facts(matrix), spectral_facts(matrix.T)
    assert one.condition_number == pytest.approx(other.condition_number, rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (20, 8), (8, 20), (150, 150), (200, 64), (64, 200), (130, 120)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient_is_infinite(shape, dtype):
    matrix = random_matrix(shape, 5).to(dtype)
    tall = matrix if shape[0] > shape[1] else matrix.T
    tall[:, 0] = tall[:, 1]
    facts = spectral_facts(matrix, measures="all")
    assert (facts.condition_number, facts.sigma_min) == (math.inf, 0.0)
    assert facts.entropy_deficit == math.inf
    assert facts.log_volume == -math.inf
    assert spectral_facts(matrix).condition_number == math.inf


def test_zero_matrix_is_infinite_and_not_nan():
    facts = spectral_facts(torch.zeros(4, 3), measures="all")
    assert facts.condition_number == math.inf
    numbers = [value for value in vars(facts).values() if isinstance(value, float)]
    assert not any(math.isnan(value) for value in numbers)


@pytest.mark.parametrize("scale", [1e-38, 1e37])
@pytest.mark.parametrize("shape", [(12, 5), (200, 64)])
def test_extreme_magnitudes_neither_overflow_nor_vanish(scale, shape):
    matrix = planted(shape, np.geomspace(10.0, 1.0, min(shape))) * scale
    assert condition_number(matrix.float()) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "NaN or infinity in 1 of 4"),
        (torch.full((2, 2), math.inf), "NaN or infinity in 4 of 4"),
        (torch.zeros(0, 3), "non-empty matrix"),
        (torch.zeros(3), "non-empty matrix"),
        (torch.ones(2, 2, dtype=torch.int8), "floating-point"),
    ],
)
def test_bad_input_is_refused(matrix, message):
    for function in (condition_number, condition_number_bound):
        with pytest.raises(ValueError, match=message):
            function(matrix)


def test_non_contiguous_float8_and_unmodified():
    matrix = random_matrix((100, 60), 6).float()
    before = matrix.clone()
    assert spectral_facts(matrix[::2]) == spectral_facts(matrix[::2].clone())
    assert torch.equal(matrix, before)
    eighth = matrix.to(torch.float8_e4m3fn)
    assert spectral_facts(eighth).condition_number == pytest.approx(condition_number(eighth.float()), rel=1e-6)


def test_the_same_matrix_gives_the_same_facts():
    matrix = random_matrix((200, 64), 7).float()
    state = torch.random.get_rng_state()
    assert spectral_facts(matrix) == spectral_facts(matrix.clone())
    assert torch.equal(torch.random.get_rng_state(), state)


@settings(max_examples=40)
@given(
    st.sampled_from([(8, 8), (60, 20), (150, 150), (64, 200)]),
    st.floats(0.0, 9.0),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_bound_is_a_bound(shape, decades, steps, dtype):
    n = min(shape)
    matrix = planted(shape, np.geomspace(10.0**decades, 1.0, n)).to(dtype)
    values = reference(matrix)
    assert 1.0 <= condition_number_bound(matrix, max_steps=steps) <= values[0] / values[-1] * (1 + 1e-9)
