"""CondFT as a PEFT method: every promise of the adapter life cycle, bit for bit where it says so."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from condft import CondFTConfig
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_models import logits


@pytest.fixture
def trained(tiny_llama, token_ids) -> PeftModel:
    model = get_peft_model(tiny_llama(), CondFTConfig(trainable_fraction=0.4))
    train(model, token_ids)
    return model


def test_wrapping_changes_no_logit(tiny_llama, token_ids):
    reference = logits(tiny_llama(), token_ids)
    assert torch.equal(logits(get_peft_model(tiny_llama(), CondFTConfig(num_tensors=9)), token_ids), reference)


def test_only_the_copies_move(tiny_llama, trained):
    base = dict(tiny_llama().named_parameters())
    for name, parameter in trained.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in base:
            assert torch.equal(parameter, base[plain]), name
        else:
            assert not torch.equal(parameter, base[plain.replace("condft_weight.default", "weight")]), name


def test_disable_merge_unmerge_unload(tiny_llama, trained, token_ids):
    reference, adapted = logits(tiny_llama(), token_ids), logits(trained, token_ids)
    assert not torch.equal(adapted, reference)
    with trained.disable_adapter():
        assert torch.equal(logits(trained, token_ids), reference)
    trained.merge_adapter()
    assert torch.equal(logits(trained, token_ids), adapted)
    with trained.disable_adapter():
        assert torch.equal(logits(trained, token_ids), reference)
    trained.merge_adapter(safe_merge=True)
    trained.unmerge_adapter()
    assert torch.equal(logits(trained, token_ids), adapted)
    assert torch.equal(logits(trained.unload(), token_ids), reference)


@pytest.mark.parametrize(
    "units",
    [["model.layers.1.self_attn.q_proj.weight"], [f"model.layers.{i}.self_attn.q_proj.weight[h1]" for i in (0, 2)]],
)
def test_what_is_cast_while_merged_is_unmerged_in_its_new_dtype(tiny_llama, token_ids, units):
    model = get_peft_model(tiny_llama(), CondFTConfig(target_units=units))
    train(model, token_ids)
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), logits(tiny_llama().bfloat16(), token_ids))


def test_merge_and_unload_gives_a_plain_model(trained, token_ids, tmp_path):
    adapted = logits(trained, token_ids)
    merged = trained.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert torch.equal(logits(merged, token_ids), adapted)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), token_ids), adapted)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_gives_the_same_logits_and_never_analyses_again(
    tiny_llama, trained, token_ids, tmp_path, monkeypatch, low_cpu_mem_usage
):
    trained.save_pretrained(tmp_path)
    monkeypatch.setattr("condft.tuner.choosing.resolve.analyze_units", lambda *_, **__: pytest.fail("analyzed again"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, token_ids), logits(trained, token_ids))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_file_holds_the_selection_and_nothing_else(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    keys = {f"base_model.model.{n.removesuffix('weight')}condft_weight" for n in config["target_units"]}
    assert tensors.keys() == keys
    assert config["peft_type"] == "CONDFT"
    assert len(config["report_fingerprint"]) == 64
    assert isinstance(PeftConfig.from_pretrained(tmp_path), CondFTConfig)


def test_a_scope_that_matches_embeddings_saves_none(tiny_llama, tmp_path):
    """PEFT writes the whole base embedding when `target_modules` matches one, trained or not."""
    for options in ({"target_modules": ".*"}, {"target_modules": ["q_proj", "lm_head"], "order": "highest"}):
        config = CondFTConfig(num_tensors=3, **options)
        get_peft_model(tiny_llama(tied=False), config).save_pretrained(tmp_path)
        assert len(config.target_units) == 3
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3, options


def test_several_adapters(tiny_llama, trained, token_ids):
    reference, first = logits(tiny_llama(), token_ids), logits(trained, token_ids)
    trained.add_adapter("other", CondFTConfig(num_tensors=5, order="highest"))
    assert torch.equal(logits(trained, token_ids), first)
    trained.set_adapter("other")
    assert torch.equal(logits(trained, token_ids), reference)
    train(trained, token_ids)
    second = logits(trained, token_ids)
    assert not torch.equal(second, reference)
    trained.set_adapter("default")
    assert torch.equal(logits(trained, token_ids), first)
    trained.delete_adapter("default")
    trained.set_adapter("other")
    assert torch.equal(logits(trained, token_ids), second)
    assert trained.peft_config.keys() == {"other"}


def test_a_second_adapter_is_selected_from_the_base_weights(tiny_llama, trained):
    """Not from the trained copies, nor from merged weights."""
    expected = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=6)).peft_config["default"].target_units
    trained.add_adapter("other", CondFTConfig(num_tensors=6))
    assert trained.peft_config["other"].target_units == expected


def test_a_second_adapter_of_the_same_name_is_refused(trained):
    """Its units would train beside those of the first, which the config no longer names."""
    for model in (trained, trained.get_base_model()):
        with pytest.raises(ValueError, match=r"has an adapter 'default' already, in \d+ layers.*unload"):
            get_peft_model(model, CondFTConfig(num_tensors=1))
    assert trained.peft_config["default"].trainable_fraction == 0.4
    again = get_peft_model(trained.unload(), CondFTConfig(num_tensors=1))
    assert len([p for p in again.parameters() if p.requires_grad]) == 1


def test_two_adapters_on_one_weight_cannot_act_together(trained, token_ids):
    trained.add_adapter("other", CondFTConfig(target_units=trained.peft_config["default"].target_units[:1]))
    trained.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="active together"):
        logits(trained, token_ids)


def test_modules_to_save_goes_beside_it(tiny_llama, token_ids, tmp_path):
    config = CondFTConfig(num_tensors=4, modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(tied=False), config)
    train(model, token_ids)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(key for key in tensors if "condft" not in key) == ["base_model.model.lm_head.weight"]
    loaded = PeftModel.from_pretrained(tiny_llama(tied=False), tmp_path)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def test_a_saved_module_is_no_candidate(tiny_llama):
    config = CondFTConfig(num_tensors=28, modules_to_save=["down_proj"])
    get_peft_model(tiny_llama(), config)
    assert len(config.target_units) == 24
    assert not any("down_proj" in name for name in config.target_units)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "linear_without_bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(3, 6)),
    "conv1d_of_transformers": (lambda: Conv1D(4, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), lambda: torch.randint(0, 9, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2), lambda: torch.randn(2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, dilation=2), lambda: torch.randn(2, 2, 8, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_kind(kind):
    """Against the same layer unfrozen by hand: same output, same step, same merged weight, untouched bias."""
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    plain, x = nn.Sequential(make()), draw()
    wrapped_base = nn.Sequential(make())
    wrapped_base.load_state_dict(plain.state_dict())
    model = get_peft_model(wrapped_base, CondFTConfig(target_modules=["0"]))
    assert torch.equal(model(x), plain(x))
    for each, parameters in ((plain, [plain[0].weight]), (model, [p for p in model.parameters() if p.requires_grad])):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        each(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model(x), plain(x))
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, plain[0].weight)
    if getattr(plain[0], "bias", None) is not None:
        assert torch.equal(merged[0].bias, plain[0].bias)


def test_an_adapter_of_another_base_is_refused(tiny_llama, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights do not exist in this base model"):
        PeftModel.from_pretrained(tiny_llama(layers=1), tmp_path)


def test_files_that_do_not_fit_are_refused(tiny_llama, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    for broken in (
        {**tensors, first: tensors[first][:-1].clone()},
        {key: value for key, value in tensors.items() if key != first},
        {**tensors, "base_model.model.model.layers.0.mlp.extra.condft_weight": torch.zeros(2)},
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=r"does not fit this base model: 1 of \d+ weights differ"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_merging_twice_and_broken_weights_are_refused(trained):
    trained.add_adapter("other", CondFTConfig(target_units=trained.peft_config["default"].target_units))
    trained.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        trained.add_adapter("third", CondFTConfig(num_tensors=2))
    with pytest.raises(ValueError, match="Unmerge first"):
        trained.merge_adapter(["other"])
    trained.unmerge_adapter()
    next(p for p in trained.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        trained.merge_adapter(safe_merge=True)


def test_an_unsupported_layer_is_refused():
    model = nn.ModuleDict({"rnn": nn.Bilinear(3, 3, 3)})
    with pytest.raises(ValueError, match="no weight that CondFT can train"):
        get_peft_model(model, CondFTConfig())


def test_transformers_own_adapter_methods(tiny_llama, token_ids, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model, token_ids), logits(trained, token_ids))
    model.disable_adapters()
    assert torch.equal(logits(model, token_ids), logits(tiny_llama(), token_ids))
