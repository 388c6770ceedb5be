"""Entropy through a linear unit: closed forms against SciPy, bounds over random spectra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from condft.spectra import spectral_facts
from scripts.research.information import (
    LIPSCHITZ_CONSTANTS,
    activation_entropy_bound,
    entropy_change,
    entropy_deficit,
    entropy_deficit_bounds,
    gaussian_entropy,
    log_specht_ratio,
    log_volume,
    output_covariance,
    output_entropy,
)

SQUARE, WIDE, TALL = (5, 5), (3, 7), (8, 4)

spectra = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40)


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(size: int, seed: int = 1) -> torch.Tensor:
    factor = weight_of((size, size + 2), seed)
    return factor @ factor.T


def kappa_of(spectrum: list[float]) -> float:
    return max(spectrum) / min(spectrum)


# --- linear units ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL])
def test_output_covariance_is_that_of_samples(shape):
    weight, covariance = weight_of(shape), covariance_of(shape[1])
    x = stats.multivariate_normal(cov=covariance.numpy()).rvs(200_000, random_state=0)
    sampled = np.cov(weight.numpy() @ x.T)
    computed = output_covariance(weight, covariance)
    assert np.abs(sampled - computed.numpy()).max() < 0.02 * computed.abs().max()
    assert torch.equal(computed, computed.T)


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL])
@pytest.mark.parametrize("whitened", [True, False])
def test_entropies_agree_with_scipy(shape, whitened):
    """SciPy takes a singular Gaussian's entropy on the subspace it lives on, as we do for a tall weight."""
    weight = weight_of(shape)
    covariance = None if whitened else covariance_of(shape[1])
    x = stats.multivariate_normal(cov=np.eye(shape[1]) if whitened else covariance.numpy())
    y = stats.multivariate_normal(cov=output_covariance(weight, covariance).numpy(), allow_singular=True)
    assert output_entropy(weight, covariance) == pytest.approx(y.entropy(), abs=1e-9)
    assert entropy_change(weight, covariance) == pytest.approx(y.entropy() - x.entropy(), abs=1e-9)
    per_dimension = output_entropy(weight, covariance, per_dimension=True)
    assert per_dimension * min(shape) == pytest.approx(y.entropy(), abs=1e-9)


def test_gaussian_entropy_agrees_with_scipy_and_with_samples():
    covariance = covariance_of(4)
    x = stats.multivariate_normal(cov=covariance.numpy())
    assert gaussian_entropy(covariance) == pytest.approx(x.entropy(), abs=1e-10)
    assert gaussian_entropy(covariance, per_dimension=True) == pytest.approx(x.entropy() / 4, abs=1e-10)
    sampled = -x.logpdf(x.rvs(100_000, random_state=1)).mean()
    assert gaussian_entropy(covariance) == pytest.approx(sampled, abs=0.02)


def test_log_volume_is_the_log_determinant():
    weight = weight_of(SQUARE)
    assert log_volume(weight) == pytest.approx(float(torch.linalg.slogdet(weight).logabsdet), abs=1e-12)
    assert log_volume(weight, per_dimension=True) == pytest.approx(log_volume(weight) / 5, abs=1e-12)
    tall = weight_of(TALL)
    assert log_volume(tall) == pytest.approx(0.5 * float(torch.logdet(tall.T @ tall)), abs=1e-12)
    assert log_volume(tall.T) == pytest.approx(log_volume(tall), abs=1e-12)


@given(st.sampled_from([SQUARE, TALL]), st.integers(0, 1000))
def test_without_dropped_dimensions_the_change_is_the_log_volume_whatever_the_input(shape, seed):
    weight = weight_of(shape, seed)
    change = entropy_change(weight, covariance_of(shape[1], seed + 1))
    assert change == pytest.approx(log_volume(weight), abs=1e-6)


def test_a_wide_unit_changes_entropy_by_what_the_input_has():
    weight = weight_of(WIDE)
    assert entropy_change(weight, covariance_of(7)) != pytest.approx(entropy_change(weight), abs=0.1)


@given(st.sampled_from([SQUARE, WIDE, TALL]), st.floats(1e-6, 1e6))
def test_scaling_adds_log_of_the_factor_to_each_dimension(shape, factor):
    weight, covariance = weight_of(shape), covariance_of(shape[1])
    shifted = output_entropy(weight, covariance, per_dimension=True) + math.log(factor)
    assert output_entropy(factor * weight, covariance, per_dimension=True) == pytest.approx(shifted, abs=1e-9)


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL])
def test_rank_deficient_units_lose_everything(shape):
    weight = weight_of(shape)
    weight[:, 0] = weight[:, 1]
    weight[0] = weight[1]
    assert output_entropy(weight) == entropy_change(weight) == log_volume(weight) == -math.inf
    assert log_volume(torch.zeros(shape), per_dimension=True) == -math.inf


# --- the entropy deficit --------------------------------------------------------------------------------------


@given(spectra)
def test_deficit_is_the_gap_to_the_best_volume_of_the_same_norm(spectrum):
    values = torch.tensor(spectrum, dtype=torch.float64)
    best = torch.full_like(values, float(values.square().mean().sqrt()))
    gap = log_volume(best.diag()) - log_volume(values.diag())
    assert entropy_deficit(values) == pytest.approx(gap, abs=1e-9 * len(spectrum))
    assert entropy_deficit(values, per_dimension=True) * len(spectrum) == pytest.approx(entropy_deficit(values))


@given(spectra, st.floats(1e-200, 1e200), st.randoms(use_true_random=False))
def test_deficit_ignores_scale_and_order(spectrum, factor, random):
    deficit = entropy_deficit(torch.tensor(spectrum, dtype=torch.float64))
    random.shuffle(spectrum)
    again = entropy_deficit(factor * torch.tensor(spectrum, dtype=torch.float64))
    assert again == pytest.approx(deficit, rel=1e-9, abs=1e-12 * len(spectrum))


def test_equal_values_lose_nothing_and_a_zero_everything():
    assert entropy_deficit(torch.full((9,), 0.3)) == 0.0
    assert entropy_deficit(torch.tensor([1.0, 0.0])) == math.inf


@pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL])
def test_the_analyzer_and_the_mathematics_agree(shape):
    weight = weight_of(shape)
    facts = spectral_facts(weight, measures="all")
    assert entropy_deficit(torch.linalg.svdvals(weight)) == pytest.approx(facts.entropy_deficit, rel=1e-9)
    assert log_volume(weight) == pytest.approx(facts.log_volume, abs=1e-9)


@given(spectra)
def test_kappa_bounds_the_deficit(spectrum):
    lower, upper = entropy_deficit_bounds(kappa_of(spectrum), len(spectrum))
    deficit = entropy_deficit(torch.tensor(spectrum, dtype=torch.float64))
    assert lower - 1e-9 <= deficit <= upper + 1e-9


@given(st.floats(1.0, 1e150), st.integers(2, 60))
def test_the_lower_bound_is_attained(kappa, n):
    middle = math.hypot(kappa, 1.0) / math.sqrt(2.0)
    spectrum = torch.tensor([kappa, 1.0] + [middle] * (n - 2), dtype=torch.float64)
    lower, _ = entropy_deficit_bounds(kappa, n)
    assert entropy_deficit(spectrum) == pytest.approx(lower, rel=1e-9, abs=1e-12)


@given(st.floats(1.0, 1e8), st.integers(2, 3000))
def test_the_upper_bound_holds_for_the_worst_spectrum(kappa, n):
    """The deficit is convex in the log singular values, so the worst spectrum has only the two ends."""
    counts = np.arange(1, n)
    ends = 0.5 * n * np.log((counts * kappa**2 + n - counts) / n) - counts * np.log(kappa)
    assert ends.max() <= entropy_deficit_bounds(kappa, n)[1] * (1 + 1e-9) + 1e-12 * n


@pytest.mark.parametrize("kappa", [1.01, 3.0, 1e3, 1e6])
def test_the_upper_bound_is_approached(kappa):
    n = 4000
    worst = max(
        0.5 * math.log((k * kappa**2 + n - k) / n) - k / n * math.log(kappa) for k in range(1, n)
    )  # per dimension
    assert worst == pytest.approx(entropy_deficit_bounds(kappa, n, per_dimension=True)[1], rel=1e-4)


@pytest.mark.parametrize("kappa", [1.2, 2.0, 30.0, 1e6, 1e12])
def test_specht_as_written(kappa):
    h = kappa**2
    written = math.log(h - 1) + math.log(h) / (h - 1) - 1 - math.log(math.log(h))
    assert log_specht_ratio(kappa) == pytest.approx(written, rel=1e-12)


def test_specht_where_the_written_form_fails():
    assert log_specht_ratio(1.0) == 0.0
    for u in (1e-9, 1e-5, 1e-3):
        assert log_specht_ratio(math.exp(u)) == pytest.approx(u * u / 2, rel=1e-6)
    below, above = math.exp(0.05 * (1 - 1e-9)), math.exp(0.05 * (1 + 1e-9))
    assert log_specht_ratio(above) == pytest.approx(log_specht_ratio(below), rel=1e-8)  # where the series ends
    u = math.log(1e300)
    assert log_specht_ratio(1e300) == pytest.approx(2 * u - math.log(2 * u) - 1, rel=1e-12)
    assert log_specht_ratio(math.inf) == math.inf


@given(st.floats(1.0, 1e300), st.integers(2, 10_000))
def test_bounds_are_ordered_and_finite(kappa, n):
    lower, upper = entropy_deficit_bounds(kappa, n)
    assert 0.0 <= lower < math.inf
    assert upper < math.inf
    assert lower <= upper * (1 + 1e-12)


def test_bounds_at_their_ends():
    assert entropy_deficit_bounds(1.0, 1) == entropy_deficit_bounds(1.0, 7) == (0.0, 0.0)
    assert entropy_deficit_bounds(math.inf, 7) == (math.inf, math.inf)
    lower, _ = entropy_deficit_bounds(3.0, 5)
    assert lower == pytest.approx(math.log((3 + 1 / 3) / 2))
    assert entropy_deficit_bounds(3.0, 5, per_dimension=True)[0] == pytest.approx(lower / 5)


# --- activations ----------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def slope(name: str, at: float) -> float:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(ACTIVATIONS[name](x), x)[0])


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(LIPSCHITZ_CONSTANTS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lipschitz_constants_are_the_steepest_slopes(name):
    grid = torch.linspace(-12.0, 12.0, 4801, dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(ACTIVATIONS[name](grid).sum(), grid)[0].abs()
    constant = LIPSCHITZ_CONSTANTS[name]
    assert float(slopes.max()) <= constant * (1 + 1e-14)
    around = float(grid.detach()[slopes.argmax()])
    steepest = minimize_scalar(lambda x: -slope(name, x), bounds=(around - 0.01, around + 0.01), method="bounded")
    assert max(-steepest.fun, float(slopes.max())) == pytest.approx(constant, rel=1e-12)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "silu"])
@pytest.mark.parametrize("deviation", [0.05, 1.0])
def test_activation_bound_holds_for_sampled_entropies(name, deviation):
    """Around the steepest point a narrow Gaussian all but attains it: with L = 1 it would fail for GELU and SiLU."""
    center = {"gelu": math.sqrt(2.0), "silu": 2.3993572805154674}.get(name, 0.0)
    y = stats.norm(center, deviation)
    samples = torch.from_numpy(y.rvs(200_000, random_state=2))
    sampled = stats.differential_entropy(ACTIVATIONS[name](samples).numpy())
    bound = activation_entropy_bound(float(y.entropy()), 1, LIPSCHITZ_CONSTANTS[name])
    assert sampled <= bound + 0.005
    if deviation == 0.05:
        assert sampled == pytest.approx(bound, abs=0.01)


def test_activation_bound_against_an_integrated_density():
    """h(tanh y) by quadrature of the density of tanh y, y standard normal."""

    def integrand(z: float) -> float:
        density = stats.norm.pdf(math.atanh(z)) / (1 - z * z)
        return -density * math.log(density) if density > 0 else 0.0

    entropy = quad(integrand, -1 + 1e-12, 1 - 1e-12, limit=500)[0]
    assert entropy == pytest.approx(
        float(stats.norm.entropy()) + quad(lambda y: stats.norm.pdf(y) * math.log1p(-(math.tanh(y) ** 2)), -9, 9)[0],
        abs=1e-5,
    )
    assert entropy < activation_entropy_bound(float(stats.norm.entropy()), 1, LIPSCHITZ_CONSTANTS["tanh"])


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_volume(torch.zeros(3)), r"weight has to be a non-empty matrix, got a tensor of shape \(3,\)"),
        (lambda: log_volume(torch.zeros(0, 3)), "non-empty matrix"),
        (lambda: log_volume(torch.ones(2, 2, dtype=torch.int32)), "floating-point, got dtype torch.int32"),
        (lambda: log_volume(torch.tensor([[1.0, math.nan]])), "weight holds NaN or infinity in 1 of 2"),
        (lambda: output_entropy(torch.eye(3), torch.eye(2)), "needs a covariance of 3 x 3"),
        (lambda: gaussian_entropy(torch.ones(2, 3)), "covariance has to be symmetric"),
        (lambda: gaussian_entropy(torch.tensor([[2.0, 1.0], [0.0, 2.0]])), "covariance has to be symmetric"),
        (lambda: gaussian_entropy(torch.diag(torch.tensor([1.0, 0.0]))), "leading 2 x 2 block is singular"),
        (lambda: entropy_deficit(torch.tensor([1.0, -1.0])), "the smallest of these is -1"),
        (lambda: entropy_deficit(torch.zeros(2, 2)), "singular_values has to be a non-empty vector"),
        (lambda: entropy_deficit_bounds(0.9, 3), "no 3 singular values have a condition number of 0.9"),
        (lambda: entropy_deficit_bounds(math.nan, 3), "condition number of nan"),
        (lambda: entropy_deficit_bounds(2.0, 1), "no 1 singular values"),
        (lambda: entropy_deficit_bounds(2.0, 0), "at least one dimension"),
        (lambda: log_specht_ratio(0.5), "at least 1, got 0.5"),
        (lambda: activation_entropy_bound(0.0, 3, 0.0), "positive finite Lipschitz constant"),
        (lambda: activation_entropy_bound(0.0, 0, 1.0), "at least one coordinate"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
