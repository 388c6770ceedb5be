"""The noise floor against the rounding of real matrices."""

import pytest
import torch

from condft import analyze
from condft.spectra import code_rounding_error, rounding_noise, spectral_facts
from tests.helpers.planted import random_matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 200), (400, 100), (64, 300)])
def test_it_is_the_spectral_norm_of_the_rounding(dtype, shape):
    exact = random_matrix(shape)
    stored = exact.to(dtype)
    rounding = torch.linalg.svdvals(stored.double() - exact)[0]
    floor = rounding_noise(shape, dtype, float(exact.norm()))
    assert float(rounding) == pytest.approx(floor, rel=0.12)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 4096)])
def test_quantized_codes_err_by_a_uniform_part_of_their_step(bits, group):
    """Evenly spaced codes err by step / sqrt(12), and the largest of a group sets the step."""
    codes = torch.linspace(-1, 1, 2**bits - 1)
    largest = torch.randn(400, group, generator=torch.Generator().manual_seed(1)).abs().amax(1).square().mean().sqrt()
    step = 2 * float(largest) / (2**bits - 2)
    assert code_rounding_error(codes, group) == pytest.approx(step / 12**0.5, rel=0.05)


def test_a_row_says_when_sigma_min_lies_under_it():
    """A 96 x 96 matrix of condition number 1e4 is resolved in fp32, not in bf16."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q for _ in range(2))
    matrix = (left * torch.logspace(4, 0, 96, dtype=torch.float64)) @ right
    resolved = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(96, 96, bias=False, dtype=dtype)
        layer.weight.data = matrix.to(dtype)
        row = analyze(torch.nn.Sequential(layer), progress=False).rows[0]
        resolved[dtype] = row.resolved
        assert row.noise_floor == pytest.approx(rounding_noise((96, 96), dtype, row.frobenius_norm))
    assert resolved == {torch.float32: True, torch.bfloat16: False}
    assert spectral_facts(matrix).condition_number == pytest.approx(1e4, rel=1e-3)
