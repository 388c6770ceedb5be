"""Batched calls: each matrix has the figures that it has alone. On the CPU; for CUDA see test_cuda.py."""

import math

import numpy as np
import pytest
import torch

from condft.spectra import batch_size, batched_facts, spectral_facts
from condft.spectra.batched import facts as batches
from condft.spectra.lanczos import start_vectors
from tests.helpers.planted import planted, random_matrix, reference

# One a route: eigen, cholesky of a square, gram and then cholesky, cholesky alone (fp64).
SHAPES = [(64, 200), (200, 64), (272, 272), (288, 700), (700, 288)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling up to 64 takes long here."""
    monkeypatch.setattr(batches, "_MOST", 8)


def matrices(shape: tuple[int, int], dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    return [random_matrix(shape, seed).to(dtype) for seed in range(count)]


@pytest.mark.parametrize("facts", [spectral_facts, lambda matrix, **options: batched_facts([matrix], **options)])
def test_unknown_measures_are_refused(facts):
    with pytest.raises(ValueError, match="measures='entropy' is unknown: choose one of 'basic', 'all'"):
        facts(torch.ones(2, 2), measures="entropy")


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measures", ["basic", "all"])
def test_agrees_with_numpy_and_with_one_at_a_time(shape, dtype, measures):
    members = matrices(shape, dtype)
    for matrix, facts in zip(members, batched_facts(members, measures=measures), strict=True):
        values = reference(matrix)
        alone = spectral_facts(matrix, measures=measures)
        assert facts.method == alone.method
        assert facts.relative_error <= 1e-3
        assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=facts.relative_error)
        assert facts.sigma_max == pytest.approx(values[0], rel=1e-3)
        assert facts.frobenius_norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert (facts.log_volume is None) == (measures == "basic")
        if measures == "all":
            assert facts.log_volume == pytest.approx(np.log(values).sum(), abs=1e-6 * len(values))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_s_figures_do_not_depend_on_its_company(shape, dtype):
    """Bit for bit: alone, in another place, and next to hopeless cases, if members begin at multiples of 64 bytes."""
    members = matrices(shape, dtype)
    together = batched_facts(members, measures="all")
    assert [batched_facts([matrix], measures="all")[0] for matrix in members] == together
    assert batched_facts(members[::-1], measures="all") == together[::-1]
    n = min(shape)
    bad = [
        planted(shape, np.geomspace(1e9, 1.0, n)).to(dtype),
        torch.full(shape, math.nan, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.ones(shape, dtype=dtype),
        members[0] * 2.0**40,
    ]
    mixed = batched_facts([bad[0], members[0], bad[1], members[1], *bad[2:], members[2]], measures="all")
    assert [mixed[1], mixed[3], mixed[7]] == together


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_batch_cannot_answer_goes_its_way_alone(shape):
    n = min(shape)
    steep = planted(shape, np.geomspace(1e9, 1.0, n))
    broken = random_matrix(shape)
    broken[3, 2] = math.inf
    tiny = random_matrix(shape) * 2.0**-60
    found = batched_facts([steep, broken, tiny, torch.zeros(shape).double(), random_matrix(shape, 7)])
    assert found[0] == spectral_facts(steep)
    assert found[1] is None
    assert found[2] == spectral_facts(tiny)
    assert found[3].condition_number == math.inf
    values = reference(random_matrix(shape, 7))
    assert found[4].condition_number == pytest.approx(values[0] / values[-1], rel=1e-3)


@pytest.mark.usefixtures("small_batches")
def test_a_condition_number_past_single_precision_is_found_in_double():
    """The Gram matrix in fp32 resolves this one's smallest value not at all, its neighbor's well."""
    members = [planted((700, 288), np.linspace(kappa, 1.0, 288)).float() for kappa in (2e3, 3.0)]
    assert [facts.method for facts in batched_facts(members)] == ["cholesky", "gram"]
    for matrix, facts in zip(members, batched_facts(members), strict=True):
        values = reference(matrix)
        assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=1e-3)


@pytest.mark.usefixtures("small_batches")
def test_a_proof_turns_away_an_end_that_the_start_vector_does_not_hold():
    """The smallest singular vector is orthogonal to the only start vector: the process alone would miss it."""
    n, rows = 300, 700
    start = start_vectors(n, 1, 0)[0].numpy()
    rng = np.random.default_rng(0)
    right = rng.standard_normal((n, n))
    right[:, 0] -= start * (start @ right[:, 0])
    right = np.linalg.qr(right)[0]  # its first column is orthogonal to the start
    left = np.linalg.qr(rng.standard_normal((rows, n)))[0]
    matrix = torch.from_numpy(left * np.concatenate([[0.25], np.linspace(1.0, 3.0, n - 1)]) @ right.T)
    (facts,) = batched_facts([matrix])
    assert facts.condition_number == pytest.approx(12.0, rel=1e-3)


def test_batches_are_as_large_as_memory_allows_and_large_matrices_go_alone():
    assert batch_size((64, 576), torch.bfloat16) == 64
    assert 4 <= batch_size((768, 2048), torch.bfloat16) < 64
    assert batch_size((768, 2048), torch.bfloat16) == batch_size((2048, 768), torch.bfloat16)
    for shape in ((14336, 4096), (40, 300), (2048, 2048), (600, 560)):
        assert batch_size(shape, torch.float32) == 1
    assert batch_size((64, 576), torch.float8_e4m3fn) == 1
    with pytest.raises(ValueError, match="65 matrices in a batch of 64"):
        batched_facts([torch.eye(64)] * 65)
    with pytest.raises(ValueError, match="0 matrices"):
        batched_facts([])
