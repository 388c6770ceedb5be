"""Self-distillation: the KL and its gradient, and a teacher without dropout."""

from typing import Any

import pytest
import torch

from condft.retention.measures import kl_to_base
from tests.helpers.models.distilled import TEXTS, distill, disturb

KL = "self_distillation_kl"


@pytest.mark.parametrize("kind", ["trainee", "condft_trainee"])
def test_the_kl_is_that_of_the_measures_and_the_model_is_unchanged(request: pytest.FixtureRequest, kind: str) -> None:
    model = request.getfixturevalue(kind)().train()
    distillation = distill(model)
    assert distillation.kl_to_base(model, model, TEXTS).item() == pytest.approx(0, abs=1e-6)
    trained = disturb(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kl = distillation.kl_to_base(model, model, TEXTS)
    assert kl.item() == pytest.approx(kl_to_base(model, TEXTS, model.disable_adapter, progress=False), rel=1e-5)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(module.training for module in model.modules())
    kl.backward()
    slope = sum(p.grad.square().sum().item() for p in trained.values())
    fall = 0.01 * kl.item()
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= fall / slope * parameter.grad
    lower = distillation.kl_to_base(model, model, TEXTS).item()
    assert kl.item() - lower == pytest.approx(fall, rel=0.1)


def test_the_teacher_has_no_dropout(trainee: Any) -> None:
    """The base under dropout would be a teacher that contradicts itself."""
    model = trainee(dropout=0.5).train()
    seen = []
    attention = model.get_submodule("base_model.model.model.language_model.layers.0.self_attn")
    attention.register_forward_hook(lambda module, i, o: seen.append(module.training))
    distill(model).kl_to_base(model, model, TEXTS)
    assert seen == [True, False]


def test_texts_of_one_token_are_refused(condft_trainee: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 1\): needs at least one sequence of at least 2"):
        distill(condft_trainee(), TEXTS[:, :1])
