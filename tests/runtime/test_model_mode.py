"""A model that was measured is as it was before, also if the measurement failed."""

import pytest
import torch
from torch import nn

from condft.runtime.model_mode import evaluating, flags_kept, measuring


@pytest.fixture
def model() -> nn.Module:
    """Of mixed modes: a frozen part stays in eval mode while the rest trains."""
    found = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.Dropout(0.5)).train()
    found[0].eval()
    return found


@pytest.mark.parametrize("context", [evaluating, measuring])
def test_every_mode_comes_back_also_after_an_error(model: nn.Module, context) -> None:
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), context(model) as device:
        assert device == torch.device("cpu")
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_only_measuring_turns_gradients_off_and_its_tensors_can_train_later(model: nn.Module) -> None:
    inputs = torch.ones(1, 2)
    with evaluating(model):
        assert model(inputs).requires_grad
    with measuring(model):
        kept = model(inputs)
    assert not kept.requires_grad
    (kept * model[1].weight).sum().backward()  # a tensor of `inference_mode` would be refused here
    assert model[1].weight.grad is not None


def test_flags_come_back_also_after_an_error(model: nn.Module) -> None:
    model[1].bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), flags_kept(model):
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
