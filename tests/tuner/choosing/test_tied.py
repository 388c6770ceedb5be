"""Tied weights are trained as one or refused, under either name and however they are asked for."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, train, trainable

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"include_roles": ["embedding"]}, EMBEDDING),
        ({"include_roles": ["output_head"]}, HEAD),
        ({"target_modules": ["embed_tokens"]}, EMBEDDING),
        ({"target_modules": ["lm_head", "q_proj"]}, HEAD),
        ({"target_modules": r".*(lm_head|v_proj)", "include_roles": ["output_head"]}, HEAD),
        ({"target_units": [EMBEDDING]}, EMBEDDING),
        ({"target_units": [HEAD, "model.layers.0.self_attn.q_proj.weight"]}, HEAD),
    ],
)
def test_units_are_refused_under_either_name(options: dict[str, Any], named: str) -> None:
    other = EMBEDDING if named == HEAD else HEAD
    way_out = r".*modules_to_save=.* and ensure_weight_tying=True.*tie_word_embeddings=False"
    with pytest.raises(ValueError, match=f"^{re.escape(named)} is tied to {re.escape(other)}{way_out}"):
        get_peft_model(build_tiny_llama(), CondFTConfig(**options))
    get_peft_model(build_tiny_llama(tied=False), CondFTConfig(**options))  # the last way out


def test_they_are_refused_where_another_adapter_stands_already() -> None:
    model = get_peft_model(build_tiny_llama(), CondFTConfig(target_units=["model.layers.0.self_attn.q_proj.weight"]))
    with pytest.raises(ValueError, match="is tied to"):
        model.add_adapter("other", CondFTConfig(target_units=[HEAD]))


def test_an_adapter_of_an_untied_model_is_refused_on_a_tied_one(tmp_path: Path) -> None:
    get_peft_model(build_tiny_llama(tied=False), CondFTConfig(target_units=[HEAD])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to"):
        PeftModel.from_pretrained(build_tiny_llama(), tmp_path)


def test_nobody_who_asks_for_neither_is_refused() -> None:
    config = CondFTConfig(target_modules=".*", num_tensors=3)
    get_peft_model(build_tiny_llama(), config)
    assert not {HEAD, EMBEDDING}.intersection(config.target_units or ())


def test_ties_that_no_config_tells_of_are_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    for options in ({"target_units": ["2.weight"]}, {"num_tensors": 1}, {"target_modules": ["2"]}):
        with pytest.raises(ValueError, match=r"weight is tied to"):
            get_peft_model(model, CondFTConfig(**options))
    with pytest.raises(ValueError, match=r"2 of modules_to_save is tied to 0"):
        config = CondFTConfig(target_units=["3.weight"], modules_to_save=["2"], ensure_weight_tying=True)
        get_peft_model(model, config)


def test_a_block_that_the_model_has_twice_is_trained_in_both_places() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    base = nn.Sequential(block, nn.Linear(8, 8), block)
    plain, config = copy.deepcopy(base), CondFTConfig(num_tensors=2, target_modules=r"0\.[02]")
    model, x = get_peft_model(base, config), torch.randn(3, 8)
    assert config.target_units == ["0.0.weight", "0.2.weight"]
    for each, parameters in ((plain, [plain[0][i].weight for i in (0, 2)]), (model, list(trainable(model).values()))):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        each(x).square().sum().backward()
        optimizer.step()
    adapted = model(x)
    torch.testing.assert_close(adapted, plain(x))
    assert torch.equal(model.merge_and_unload()(x), adapted)
    with pytest.raises(ValueError, match=r"2 of modules_to_save is tied to 0\.0"):
        get_peft_model(plain, CondFTConfig(target_units=["1.weight"], modules_to_save=["2"]))


@pytest.mark.parametrize("scope", [None, ["first"], ["second"], ["other", "second"]])
def test_a_layer_that_the_model_has_twice_is_refused(scope: list[str] | None) -> None:
    """PEFT finds it at its first path only, and would put the wrapper there alone."""
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": layer, "other": nn.Linear(8, 8), "second": layer})
    with pytest.raises(ValueError, match=r"(first|second)\.weight is tied to (first|second)\.weight"):
        get_peft_model(model, CondFTConfig(num_tensors=1, target_modules=scope))
    get_peft_model(model, CondFTConfig(num_tensors=1, target_modules=["other"]))


def test_modules_that_hold_tied_ones_are_not_saved_apart() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    model[2][0].weight = model[0][0].weight
    with pytest.raises(ValueError, match=r"2 of modules_to_save is tied to 0\.0"):
        get_peft_model(model, CondFTConfig(target_units=["1.0.weight"], modules_to_save=["2"]))


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_saved_modules_are_refused_or_trained_as_one(names: list[str], token_ids: Tensor, tmp_path: Path) -> None:
    units = ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match=r"of modules_to_save is tied to .* ensure_weight_tying=True"):
        get_peft_model(build_tiny_llama(), CondFTConfig(target_units=units, modules_to_save=list(names)))
    config = CondFTConfig(target_units=units, modules_to_save=list(names), ensure_weight_tying=True)
    model = get_peft_model(build_tiny_llama(), config)
    train(model, token_ids)
    inner = model.base_model.model
    head, embedding = inner.lm_head.modules_to_save["default"], inner.model.embed_tokens.modules_to_save["default"]
    assert head.weight is embedding.weight
    assert not torch.equal(head.weight, build_tiny_llama().lm_head.weight)
    adapted = logits(model, token_ids)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build_tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, token_ids), adapted)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings
    assert torch.equal(logits(again, token_ids), adapted)


def test_names_that_peft_does_not_tie_are_refused_all_the_same() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    asked = CondFTConfig(num_tensors=1, modules_to_save=["wte"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"transformer.wte of modules_to_save is tied to lm_head"):
        get_peft_model(GPT2LMHeadModel(config), asked)


def test_trained_token_rows_stay_tied(token_ids: Tensor) -> None:
    units = ["model.layers.0.self_attn.q_proj.weight"]
    model = get_peft_model(build_tiny_llama(), CondFTConfig(target_units=units, trainable_token_indices=[1, 5]))
    train(model, token_ids)
    adapted = logits(model, token_ids)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(merged.lm_head.weight[1], build_tiny_llama().lm_head.weight[1])
    assert torch.equal(logits(merged, token_ids), adapted)
