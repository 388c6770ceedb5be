"""The engine of one process: steps, clipping, optimizer state, and a model that is restored."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from condft.training.engines.base import Engine, refuse_meta_weights, restoring


def prepared(seed: int = 0) -> tuple[Engine, nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    engine = Engine(Accelerator(cpu=True))
    return engine, model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_update_returns_the_norm_and_clips() -> None:
    engine, model, optimizer = prepared()
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.zeros(2)
    assert engine.update(optimizer, list(model.parameters()), max_norm=1.0) == pytest.approx(math.sqrt(54))
    assert model.weight.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_a_norm_that_is_not_finite_takes_no_step() -> None:
    engine, model, optimizer = prepared()
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), math.inf)
    assert engine.update(optimizer, list(model.parameters()), max_norm=None) == math.inf
    assert torch.equal(model.weight, before)
    assert engine.whole_state(optimizer, model.weight) == {}


def test_optimizer_state_survives_a_round_trip() -> None:
    engine, model, optimizer = prepared()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = engine.whole_state(optimizer, model.weight)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine.set_state(other, model.weight, state)
    restored = engine.whole_state(other, model.weight)
    assert all(torch.equal(restored[key], state[key]) for key in state)
    restored["exp_avg"].zero_()
    assert state["exp_avg"].any()  # a copy: the two optimizers share no memory


def test_meta_weights_are_counted_and_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"^2 weights are on the meta device of this process, the first is 1\.weight"):
        refuse_meta_weights(model)
    refuse_meta_weights(model[0])


def test_what_accelerate_sets_on_the_model_is_undone(trainee: Any) -> None:
    model = trainee().eval()
    attributes = dict(model.__dict__)
    with pytest.raises(RuntimeError, match="within"), restoring(model):
        Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        model.train()
        parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        parameter.grad = torch.ones_like(parameter)
        assert model.__dict__.keys() > attributes.keys()
        raise RuntimeError("within")
    assert model.__dict__ == attributes
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
