"""Part of a forward is the whole one, and a changed weight is measured as the package measures it."""

import pytest
import torch
from transformers import LlamaForCausalLM

from condft.retention.measures import kl_to_base, text_cross_entropy
from scripts.research.damage.continuation import Continuation, FixedText
from tests.helpers.models.responsive_llama import build_responsive_llama, tokens

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_responsive_llama()


def test_a_forward_from_a_layer_upwards_is_the_whole_forward(model: LlamaForCausalLM) -> None:
    window, part = tokens(3), Continuation(model)
    inputs = part.inputs_of_layers(window)
    whole = model(input_ids=window).logits
    for layer in range(4):
        torch.testing.assert_close(part.logits(part.final_hidden(inputs[layer], layer)), whole)


def test_a_changed_weight_is_measured_as_the_evaluation_module_measures_it(model: LlamaForCausalLM) -> None:
    class Characters:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) - 32 for character in text]}

    window = tokens(4)
    text = "".join(chr(32 + token) for token in window.flatten().tolist())
    fixed = FixedText(Continuation(model), window, with_kl=True)
    weight, base = model.get_parameter(NAME), model.get_parameter(NAME).clone()

    def measured() -> float:
        return text_cross_entropy(model, Characters(), text, max_tokens=48, context_length=12).nats_per_token

    before = measured()
    assert fixed.cross_entropy == pytest.approx(before, rel=1e-5)
    weight.data.mul_(1.5)
    change = fixed.change(2)
    assert abs(change.cross_entropy) > 1e-3
    assert change.cross_entropy == pytest.approx(measured() - before, abs=1e-5)

    from contextlib import contextmanager

    @contextmanager
    def as_base():  # type: ignore[no-untyped-def]
        changed = weight.detach().clone()
        weight.data.copy_(base)
        yield
        weight.data.copy_(changed)

    assert change.kl == pytest.approx(kl_to_base(model, window, as_base), rel=1e-4)
