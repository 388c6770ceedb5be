"""Directions and curvature by shared backward passes."""

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from scripts.research.damage.continuation import Continuation, FixedText
from scripts.research.gradients import adam_directions, fisher_information, language_loss
from tests.helpers.models.responsive_llama import build_responsive_llama, tokens

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_responsive_llama()


def test_the_direction_lowers_the_loss_as_its_slope_says(model: LlamaForCausalLM) -> None:
    losses = [partial(language_loss, model, batch) for batch in tokens(8).split(2)]
    found = adam_directions(model, [NAME], losses)[NAME]
    fixed = FixedText(Continuation(model), tokens(8), with_kl=False)
    model.get_parameter(NAME).data.add_(found["direction"], alpha=1e-2)
    assert found["direction"].norm() == pytest.approx(1.0, rel=1e-5)
    assert 0 < found["slope"] <= found["gradient_norm"] * (1 + 1e-6)
    assert -fixed.change(2).cross_entropy == pytest.approx(found["slope"] * 1e-2, rel=0.1)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_fisher_information_predicts_the_divergence_of_a_small_step(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    own = torch.randint(64, (128, 1))
    for _ in range(7):
        own = torch.cat([own, torch.multinomial(model(input_ids=own).logits[:, -1].softmax(-1), 1)], dim=1)
    direction = torch.randn(32, 48)
    direction /= direction.norm()
    trace, along = fisher_information(model, {NAME: direction}, own)[NAME]
    fixed = FixedText(Continuation(model), own, with_kl=True)
    model.get_parameter(NAME).data.add_(direction, alpha=0.05)
    assert fixed.change(2).kl == pytest.approx(0.5 * along * 0.05**2, rel=0.4)  # 128 sequences: some 13 % of noise
    assert along < trace
