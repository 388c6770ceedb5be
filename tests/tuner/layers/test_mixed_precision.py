"""A weight in a wider dtype than its product gives the same bits as a cast weight, and the cast is not kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condft.tuner.layers.mixed_precision import mixed_precision_linear


def cast_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 37, 64), (37, 64), (64,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_casting_first(dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight, bias = torch.randn(96, 64, requires_grad=True), torch.randn(96, requires_grad=True) if has_bias else None
    found = []
    for layer in (mixed_precision_linear, cast_first):
        result = layer(x, weight, bias)
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
        found.append((result, *torch.autograd.grad(result.float().square().sum(), inputs)))
    for mine, wanted in zip(*found, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


def test_the_cast_weight_is_not_kept() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    kept: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def noted(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        mixed_precision_linear(x, weight, None)
    assert sorted(kept, key=str) == [(torch.bfloat16, (3, 8)), (torch.float32, (5, 8))]


def test_frozen_operands_get_no_gradient() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(5, 8, requires_grad=True)
    mixed_precision_linear(x, weight, None).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
