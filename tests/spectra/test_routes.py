"""Which route answers, and that its answer is right where the one before would be wrong."""

import math

import numpy as np
import pytest
import torch

from condft.spectra import spectral_facts
from condft.spectra.lanczos import Ends
from condft.spectra.routes import check_measures, find_ends, fp32_proof_suffices, lanczos_dtype, settled
from tests.helpers.planted import planted, random_matrix, reference


@pytest.mark.parametrize(
    ("shape", "spectrum", "measures", "method"),
    [
        ((400, 300), np.linspace(9.0, 1.0, 300), "basic", "gram"),
        ((400, 300), np.linspace(9.0, 1.0, 300), "all", "gram"),
        ((600, 300), np.linspace(900.0, 1.0, 300), "basic", "cholesky"),
        ((600, 300), np.geomspace(1e7, 1.0, 300), "basic", "qr"),
        ((300, 270), np.linspace(9.0, 1.0, 270), "basic", "qr"),
        ((300, 300), np.geomspace(1e4, 1.0, 300), "basic", "cholesky"),
        ((300, 300), np.geomspace(1e8, 1.0, 300), "basic", "lu"),
        ((200, 64), np.linspace(900.0, 1.0, 64), "basic", "eigen"),
        ((120, 120), np.geomspace(1e4, 1.0, 120), "all", "eigen"),
        ((200, 64), np.geomspace(1e7, 1.0, 64), "basic", "qr"),
        ((120, 120), np.geomspace(1e8, 1.0, 120), "basic", "lu"),
        ((120, 120), np.geomspace(1e14, 1.0, 120), "basic", "svd"),
        ((40, 40), np.linspace(9.0, 1.0, 40), "basic", "svd"),
    ],
)
def test_the_route_follows_shape_and_condition(shape, spectrum, measures, method):
    matrix = planted(shape, spectrum).float() if method != "svd" else planted(shape, spectrum)
    assert spectral_facts(matrix, measures=measures).method == method


@pytest.mark.parametrize(
    ("shape", "seed"),
    [((256, 160), 1101), ((200, 64), 1084), ((400, 120), 1001), ((300, 100), 1115), ((256, 256), 5083)],
)
def test_an_end_that_the_start_vector_hardly_holds_is_found(shape, seed):
    """One Lanczos process takes the neighbor of the end for the end here, settled and 1 to 4 % off."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = reference(matrix)
    facts = spectral_facts(matrix)
    assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=facts.relative_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_narrow_rows_round_their_gram_matrix_more(dtype):
    """fp32 rows in an fp64 Gram matrix put sigma_min off by 1.6e-3 at 8192 rows and a condition number of 1e6."""
    matrix = planted((8192, 128), np.linspace(1e6 if dtype == torch.float32 else 20.0, 1.0, 128), 1).to(dtype)
    values = reference(matrix)
    facts = spectral_facts(matrix)
    assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=facts.relative_error)


@pytest.mark.parametrize("shape", [(20, 10), (100, 100), (600, 300), (400, 300)])
def test_the_ends_and_the_volume_are_those_of_the_whole_spectrum(shape):
    matrix = random_matrix(shape)
    values = reference(matrix)
    answer = find_ends(matrix, "all", 1e-3)
    assert answer.largest == pytest.approx(values[0], rel=1e-3)
    assert answer.smallest == pytest.approx(values[-1], rel=1e-3)
    assert answer.log_volume == pytest.approx(np.log(values).sum(), abs=1e-6 * len(values))
    assert answer.error <= 1e-3


def test_unknown_measures_name_the_choices():
    check_measures("basic")
    with pytest.raises(ValueError, match="measures='none' is unknown: choose one of 'basic', 'all'"):
        check_measures("none")


def test_small_decisions():
    assert fp32_proof_suffices(1024, 1e-3)
    assert not fp32_proof_suffices(100_000, 1e-3)
    assert lanczos_dtype(torch.ones(1, dtype=torch.float64)) is torch.float64
    assert lanczos_dtype(torch.ones(1, dtype=torch.bfloat16)) is torch.float32
    assert settled(Ends(2.0, 1.0, 1e-5, math.inf, 3), 1e-4)
    assert not settled(Ends(2.0, 1.0, 1e-3, 0.0, 3), 1e-4)
    assert settled(Ends(2.0, 1.0, 1e-3, 0.0, 3, exhausted=True), 1e-4)
