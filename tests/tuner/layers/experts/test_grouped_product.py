"""Grouped products with some experts trained: both ways give the result of the assembled stack."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condft.tuner.layers.experts.grouped_product import by_gathering, expert_by_expert
from condft.tuner.layers.experts.stack import expert_stack
from condft.tuner.layers.slices import Slices

SLICES = Slices.joined(0, [(3, 4), (1, 2)])
PLACE = {1: 0, 3: 1}
# None, some or all rows of trained experts; rows after the last expert's are nobody's (expert parallelism).
ENDS = [[2, 4, 4, 9, 12], [3, 3, 5, 5, 12], [0, 5, 5, 12, 12], [2, 4, 4, 9, 10]]


def operands(ends: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Parameter, Tensor]:
    """x of 12 rows, a base of five 16 x 8 matrices, two trained copies in fp32, offsets."""
    torch.manual_seed(0)
    x, base = torch.randn(12, 8).to(dtype).requires_grad_(), torch.randn(5, 16, 8).to(dtype)
    return x, base, nn.Parameter(torch.randn(2, 16, 8)), torch.tensor(ends, dtype=torch.int32)


def result_and_gradients(result: Tensor, x: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(rows, result.shape[1], generator=torch.Generator().manual_seed(1)).to(result.dtype)
    loss = (result[:rows] * weight).sum()
    for_x, for_values = torch.autograd.grad(loss, (x, values), allow_unused=True, materialize_grads=True)
    return result[:rows], for_x[:rows], for_values


def through_the_stack(x: Tensor, base: Tensor, values: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, expert_stack(base, values, SLICES).transpose(-2, -1), offs=offs)


def alone(x: Tensor, base: Tensor, values: Tensor, offs: Tensor) -> Tensor:
    return expert_by_expert(x, base.mT.contiguous(), values.mT, offs, PLACE, is_transposed=False)


def gathered(x: Tensor, base: Tensor, values: Tensor, offs: Tensor) -> Tensor:
    return by_gathering(x, base.mT, values.to(base.dtype).mT, offs, SLICES.indices)


@pytest.mark.parametrize("product", [through_the_stack, alone, gathered])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS)
def test_any_share_of_the_rows(product: Callable[..., Tensor], dtype: torch.dtype, ends: list[int]) -> None:
    x, base, values, offs = operands(ends, dtype)
    expected = F.grouped_mm(x, SLICES.splice(base, values.to(dtype)).mT, offs=offs)
    found = product(x, base, values, offs)
    pairs = zip(
        result_and_gradients(found, x, values, ends[-1]),
        result_and_gradients(expected, x, values, ends[-1]),
        strict=True,
    )
    for mine, wanted in pairs:
        if product is through_the_stack:
            assert torch.equal(mine, wanted)
        else:
            torch.testing.assert_close(mine, wanted)


def test_rows_of_no_expert_and_experts_of_no_row_are_zero() -> None:
    x, base, values, offs = operands([0, 0, 4, 9, 10])
    result = through_the_stack(x, base, values, offs)
    for_x, for_values = torch.autograd.grad(result.sum(), (x, values))
    assert not result[10:].any()
    assert not for_x[10:].any()
    assert not for_values[0].any()
    assert for_values[1].any()


def test_autocast_leaves_it_alone_as_it_does_torchs_own() -> None:
    x, base, values, offs = operands(ENDS[0])
    plain = through_the_stack(x, base, values, offs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(through_the_stack(x, base, values, offs), plain)


def test_frozen_operands_cost_no_gradient() -> None:
    x, base, values, offs = operands(ENDS[0])
    (for_values,) = torch.autograd.grad(through_the_stack(x.detach(), base, values, offs).sum(), values)
    assert for_values.shape == values.shape
    values.requires_grad_(False)
    (for_x,) = torch.autograd.grad(through_the_stack(x, base, values, offs).sum(), x)
    assert for_x.shape == x.shape
