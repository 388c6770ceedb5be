"""The analyzer's numerics against NumPy's SVD, on planted spectra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.spectra import condition_number, spectral_facts

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (40, 12), (12, 40), (64, 64), (200, 16)]


def planted(shape: tuple[int, int], spectrum: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A matrix with given singular values between random orthogonal factors."""
    rng = np.random.default_rng(seed)
    n = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], n)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], n)))[0]
    return torch.from_numpy(left * spectrum @ right.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [1.0, 3.0, 1e3, 1e6, 1e8])
def test_agrees_with_numpy_on_planted_spectra(shape, kappa):
    n = min(shape)
    matrix = planted(shape, np.geomspace(kappa, 1.0, n) if n > 1 else np.array([kappa]))
    reference = np.linalg.svd(matrix.numpy(), compute_uv=False)
    facts = spectral_facts(matrix)
    assert facts.condition_number == pytest.approx(reference[0] / reference[-1], rel=1e-6)
    assert facts.sigma_max == pytest.approx(reference[0], rel=1e-12)
    assert facts.frobenius_norm == pytest.approx(np.linalg.norm(matrix.numpy()), rel=1e-12)
    assert facts.stable_rank == pytest.approx((reference**2).sum() / reference[0] ** 2, rel=1e-12)
    assert facts.log_volume == pytest.approx(np.log(reference).sum(), abs=1e-6 * n)


def test_equal_singular_values_are_perfectly_conditioned_and_lose_no_entropy():
    facts = spectral_facts(planted((30, 10), np.full(10, 7.0)))
    assert facts.condition_number == pytest.approx(1.0, abs=1e-12)
    assert facts.entropy_deficit == pytest.approx(0.0, abs=1e-12)
    assert facts.stable_rank == pytest.approx(10.0)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12), st.integers(0, 1000))
def test_entropy_deficit_is_never_negative_and_bounded_below_by_kappa(spectrum, seed):
    """Two ends alone already lose log((κ + 1/κ) / 2): the other values can only add to it."""
    values = np.sort(np.array(spectrum))[::-1]
    facts = spectral_facts(planted((len(values) + 3, len(values)), values, seed))
    kappa = facts.condition_number
    assert facts.entropy_deficit >= math.log((kappa + 1 / kappa) / 2) - 1e-9


@given(st.integers(-40, 40), st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_powers_of_two_change_nothing_but_the_scale(power, shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain, scaled = spectral_facts(matrix), spectral_facts(matrix * 2.0**power)
    assert scaled.condition_number == plain.condition_number
    assert scaled.stable_rank == plain.stable_rank
    assert scaled.entropy_deficit == plain.entropy_deficit
    assert scaled.sigma_min == math.ldexp(plain.sigma_min, power)
    assert scaled.frobenius_norm == math.ldexp(plain.frobenius_norm, power)


@given(st.floats(1e-30, 1e30), st.booleans())
def test_any_factor_leaves_kappa_to_rounding(factor, negative):
    matrix = planted((9, 6), np.geomspace(50.0, 1.0, 6))
    factor = -factor if negative else factor
    assert condition_number(matrix * factor) == pytest.approx(condition_number(matrix), rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 17), (17, 6), (60, 9)])
def test_transposition_changes_nothing_for_rectangles(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert spectral_facts(matrix) == spectral_facts(matrix.T)


@pytest.mark.parametrize("shape", [(8, 8), (20, 8), (8, 20)])
def test_rank_deficient_is_infinite(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    if shape[0] <= shape[1]:
        matrix[0] = matrix[1]
    else:
        matrix[:, 0] = matrix[:, 1]
    facts = spectral_facts(matrix)
    assert (facts.condition_number, facts.sigma_min) == (math.inf, 0.0)
    assert facts.entropy_deficit == math.inf
    assert facts.log_volume == -math.inf


def test_zero_matrix_is_infinite_and_not_nan():
    facts = spectral_facts(torch.zeros(4, 3))
    assert facts.condition_number == math.inf
    assert not any(math.isnan(value) for value in vars(facts).values())


@pytest.mark.parametrize("scale", [1e-38, 1e37])
def test_extreme_magnitudes_neither_overflow_nor_vanish(scale):
    matrix = planted((12, 5), np.geomspace(10.0, 1.0, 5)) * scale
    assert condition_number(matrix.float()) == pytest.approx(10.0, rel=1e-4)


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
    with pytest.raises(ValueError, match=message):
        condition_number(matrix)


def test_non_contiguous_and_unmodified():
    matrix = torch.randn(10, 6, generator=torch.Generator().manual_seed(6))
    before = matrix.clone()
    assert spectral_facts(matrix[::2]) == spectral_facts(matrix[::2].clone())
    assert torch.equal(matrix, before)
