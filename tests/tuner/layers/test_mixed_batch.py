"""Several adapters in one batch: the result of every sample is that of its adapter alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama


def perturbed(**options) -> CondFTConfig:
    return CondFTConfig(init_weights=False, **options)


def two_adapters(**options) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(build_tiny_llama(tied=False), perturbed(target_modules=["q_proj", "down_proj"]), "first")
    model.add_adapter("second", perturbed(target_modules=["q_proj", "v_proj"], **options))
    return model.eval()


def alone(model: PeftModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(input_ids=ids).logits
        model.set_adapter(name)
        return model(input_ids=ids).logits


@settings(max_examples=20)
@given(names=st.lists(st.sampled_from(["__base__", "first", "second"]), min_size=1, max_size=7))
def test_each_sample_is_computed_with_its_own_adapter(names):
    model = two_adapters()
    ids = torch.randint(0, 96, (len(names), 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    for index, name in enumerate(names):
        torch.testing.assert_close(mixed[index], alone(model, name, ids[index : index + 1])[0])


def test_the_active_adapter_and_its_gradients_are_as_before(token_ids):
    model = two_adapters()
    model.set_adapter("second")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model(input_ids=token_ids, adapter_names=["first", "__base__"])
    assert model.active_adapters == ["second"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_modules_to_save_of_one_adapter_take_part(token_ids):
    model = two_adapters(modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in model.base_model.model.lm_head.modules_to_save["second"].parameters():
            parameter += 0.1
        mixed = model(input_ids=token_ids, adapter_names=["first", "second"]).logits
    for index, name in enumerate(["first", "second"]):
        torch.testing.assert_close(mixed[index], alone(model, name, token_ids[index : index + 1])[0])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_repeats_the_names_for_every_beam(token_ids, num_beams):
    model = two_adapters()
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=token_ids, adapter_names=["first", "second"], **options)
    for index, name in enumerate(["first", "second"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=token_ids[index : index + 1], **options)[0], mixed[index])


def test_beam_search_gives_the_encoder_one_name_for_each_sample(token_ids):
    torch.manual_seed(0)
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    base = BartForConditionalGeneration(
        BartConfig(vocab_size=96, d_model=16, max_position_embeddings=64, init_std=0.2, **sizes, **heads)
    ).eval()
    model = get_peft_model(base, perturbed(target_modules=["q_proj", "fc1"]), "first").eval()
    model.add_adapter("second", perturbed(target_modules=["v_proj", "fc1"]))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = model.generate(input_ids=token_ids, adapter_names=["first", "second"], **options)
    for index, name in enumerate(["first", "second"]):
        model.set_adapter(name)
        own = model.generate(input_ids=token_ids[index : index + 1], **options)[0]
        assert torch.equal(own, mixed[index, : len(own)])


def test_disabled_adapters_stay_disabled(token_ids):
    model = two_adapters()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(
            model(input_ids=token_ids, adapter_names=["first", "second"]).logits, model(input_ids=token_ids).logits
        )


def test_what_cannot_be_mixed_is_refused(token_ids):
    model = two_adapters()
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 2"):
        model(input_ids=token_ids, adapter_names=["first"] * 3)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third.*has first, second"):
        model(input_ids=token_ids, adapter_names=["first", "third"])
    with pytest.raises(TypeError, match="list of adapter names, one for each sample, got str"):
        model(input_ids=token_ids, adapter_names="first")
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        model(input_ids=token_ids, adapter_names=["first", "second"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(input_ids=token_ids, adapter_names=["first", "second"])


def test_the_refusal_leaves_no_hook_behind(token_ids):
    model = two_adapters()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="number of inputs"):
        model(input_ids=token_ids, adapter_names=["first"])
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_embeddings_and_convolutions_are_mixed_too():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 6), nn.Conv1d(4, 3, 2), nn.Flatten(), nn.Linear(15, 2))
    model = get_peft_model(base, perturbed(target_modules=["0", "1"]), "first")
    model.add_adapter("second", perturbed(target_modules=["1", "3"]))
    model.eval()
    ids = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(2))
    names = ["second", "__base__", "first"]
    mixed = model(ids, adapter_names=names)
    model.set_adapter("second")
    torch.testing.assert_close(mixed[0], model(ids)[0])
    model.set_adapter("first")
    torch.testing.assert_close(mixed[2], model(ids)[2])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(ids)[1])


def test_a_layer_whose_batch_cannot_be_divided_is_refused_by_name():
    """Attention takes three tensors, by default with the batch second, so the batch cannot be divided."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    model = get_peft_model(Attention(), perturbed(target_units=["mha.in_proj_weight"]), "first").eval()
    with pytest.raises(TypeError, match=r"mha \(MultiheadAttention\).*does not support mixed adapter batches"):
        model(torch.randn(3, 2, 8), adapter_names=["first", "__base__", "first"])
