"""The analyzer on a GPU, against the CPU's reference in double precision. Skipped without one: not run so far."""

import numpy as np
import pytest
import torch
from torch import nn

from condft import analyze
from condft.spectra import batched_facts, condition_number_bound, spectral_facts
from tests.helpers.marks import needs_gpu
from tests.helpers.planted import planted, random_matrix, reference

pytestmark = [pytest.mark.gpu, needs_gpu]

# Every route: svd, eigen, cholesky of a square, gram and cholesky of a rectangle, qr, lu.
SHAPES = [(40, 12), (64, 576), (300, 300), (290, 700), (1536, 576), (600, 560), (1200, 1200)]
BATCHED = [(64, 576), (300, 300), (290, 700), (768, 2048)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest):
    """TF32 forbidden and allowed."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [3.0, 1e3, 1e6])
def test_agrees_with_the_reference(shape, dtype, kappa):
    # from 1 down: entries of 1e6 are infinite in fp16
    matrix = planted(shape, np.geomspace(1.0, 1 / kappa, min(shape))).to(dtype)
    values = reference(matrix)
    for measures in ("basic", "all"):
        facts = spectral_facts(matrix.cuda(), measures=measures)
        assert facts.relative_error <= 1e-2
        assert facts.condition_number == pytest.approx(values[0] / values[-1], rel=1e-3), facts.method
        assert facts.sigma_max == pytest.approx(values[0], rel=1e-3)
        assert facts.frobenius_norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
    assert facts.log_volume == pytest.approx(np.log(values).sum(), abs=1e-6 * len(values))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_matrix_gives_the_same_facts(shape):
    matrix = random_matrix(shape).float().cuda()
    facts = spectral_facts(matrix, measures="all")
    for _ in range(3):
        assert spectral_facts(matrix, measures="all") == facts
    assert spectral_facts(matrix * 2.0**9, measures="all").condition_number == facts.condition_number


@pytest.mark.parametrize("shape", [(768, 2048), (1536, 576), (290, 700)])
def test_tensor_cores_do_not_take_digits_away(shape, matmul_precision):
    """TF32 rounds entries to 11 bits: a Gram matrix of such would be off by ten times what the row vouches for."""
    matrix = planted(shape, np.geomspace(30.0, 1.0, min(shape))).float()
    values = reference(matrix)
    kappa = values[0] / values[-1]
    allowed = torch.backends.cuda.matmul.fp32_precision
    facts = spectral_facts(matrix.cuda())
    (batched,) = batched_facts([matrix.cuda()])
    for found in (facts, batched):
        assert found.method == "gram"
        assert found.condition_number == pytest.approx(kappa, rel=found.relative_error)
    assert condition_number_bound(matrix.cuda()) <= kappa
    assert torch.backends.cuda.matmul.fp32_precision == allowed


@pytest.mark.parametrize("shape", BATCHED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measures", ["basic", "all"])
def test_batches_agree_with_one_at_a_time_and_do_not_mix(shape, dtype, measures):
    members = [random_matrix(shape, seed).to(dtype).cuda() for seed in range(4)]
    together = batched_facts(members, measures=measures)
    for matrix, facts in zip(members, together, strict=True):
        alone = spectral_facts(matrix, measures=measures)
        assert facts.method == alone.method
        assert facts.condition_number == pytest.approx(alone.condition_number, rel=facts.relative_error)
    # Bit for bit, whoever else is in the batch and wherever the matrix stands in it.
    assert [batched_facts([matrix], measures=measures)[0] for matrix in members] == together
    assert batched_facts(members[::-1], measures=measures) == together[::-1]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down_proj = nn.Parameter(torch.randn(40, 300, 700, generator=generator) * 0.02)
        self.square = nn.Linear(320, 320, bias=False)
        self.large = nn.Linear(2304, 1100, bias=False)


def test_keep_lowest_keeps_what_a_whole_analysis_ranks_lowest():
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    with torch.no_grad():  # some hopeless ones, to be ruled out by their bounds
        for index in range(0, 40, 3):
            model["experts"].down_proj[index] *= torch.linspace(1.0, 40.0, 700)
    exact = {row.name: row for row in analyze(model, progress=False).rows}  # on the CPU
    model.cuda()
    whole = {row.name: row for row in analyze(model, progress=False).rows}
    for name, row in whole.items():
        assert row.condition_number == pytest.approx(exact[name].condition_number, rel=1e-3)
    kept = analyze(model, keep_lowest=8, progress=False)
    lowest = sorted(exact, key=lambda name: (exact[name].condition_number, name))[:8]
    assert sorted(row.name for row in kept.rows) == sorted(lowest)
    for row in kept.rows:
        assert row == whole[row.name]
    assert all(unit.condition_number_bound <= exact[unit.name].condition_number for unit in kept.screened)
