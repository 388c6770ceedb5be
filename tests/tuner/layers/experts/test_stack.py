"""`ExpertStack` reads as the stack with the trained experts in it, gradients included."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from condft.tuner.layers.experts.stack import ExpertStack, expert_stack
from condft.tuner.layers.slices import Slices


@settings(max_examples=30)
@given(st.data())
def test_any_expert_and_any_list_of_experts(data: st.DataObject) -> None:
    """By index and by gathering, whichever experts train; also where no trained expert is read."""
    trained = data.draw(st.sets(st.integers(0, 4), min_size=1))
    read = data.draw(st.lists(st.integers(0, 4), min_size=1))
    slices = Slices.joined(0, [(expert, expert + 1) for expert in trained])
    generator = torch.Generator().manual_seed(len(read))
    base = torch.randn(5, 3, 2, generator=generator)
    values = nn.Parameter(torch.randn(len(trained), 3, 2, generator=generator))
    stack, whole = expert_stack(base, values, slices), slices.splice(base, values)
    assert torch.equal(stack[torch.tensor(read)], whole[read])
    assert torch.equal(torch.stack([stack[expert] for expert in read]), whole[read])
    sums = (stack[torch.tensor(read)].sum(), whole[read].sum())
    if trained.isdisjoint(read):
        assert not sums[0].requires_grad  # the frozen experts alone
        return
    grads = [torch.autograd.grad(total, values)[0] for total in sums]
    assert torch.equal(*grads)


def test_reading_one_expert_assembles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertStack, "assembled", lambda _: pytest.fail("the whole stack was assembled"))
    stack = expert_stack(torch.zeros(5, 3, 2), nn.Parameter(torch.ones(1, 3, 2)), Slices(0, ((3, 4),)))
    assert stack[-2].sum() == 6
    assert stack[0].sum() == 0
    assert stack.transpose(1, 2).shape == (5, 2, 3)


def test_every_operation_gives_the_result_of_the_assembled_stack() -> None:
    torch.manual_seed(0)
    slices = Slices.joined(0, [(3, 4), (1, 2)])
    base, values = torch.randn(5, 8, 4), nn.Parameter(torch.randn(2, 8, 4))
    stack, whole = expert_stack(base, values, slices), slices.splice(base, values)
    assert (stack.shape, stack.dtype, len(stack), stack.transpose(1, 2).shape) == (
        base.shape,
        base.dtype,
        5,
        (5, 4, 8),
    )
    experts = torch.tensor([0, 3, 3, 1])
    for read in (
        lambda w: w[-2],
        lambda w: w[1:4],
        lambda w: w[torch.tensor(3)],
        lambda w: w[experts],
        lambda w: w[..., 2],
        lambda w: w.transpose(0, 1),
        lambda w: w.mT[experts] * 2,
        lambda w: torch.einsum("eoi,ni->no", w, torch.ones(3, 4)),
        lambda w: w.view(5, -1)[3],
    ):
        grads = []
        for weight in (stack, whole):
            result = read(weight)
            (grad,) = torch.autograd.grad(result.square().sum(), values, retain_graph=True)
            grads.append((result, grad))
        torch.testing.assert_close(grads[0], grads[1])


def test_kernels_that_would_miss_the_trained_experts_are_refused() -> None:
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, stack: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            return grads[0] * 2, torch.ones(5, 8, 4)

    stack = expert_stack(torch.randn(5, 8, 4), nn.Parameter(torch.randn(2, 8, 4)), Slices(0, ((0, 2),)))
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"would miss the trained ones: .* Set experts_implementation"):
        Foreign.apply(x, stack).sum().backward()
