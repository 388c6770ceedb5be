"""CondFT as a PEFT method: every promise of the adapter life cycle, bit for bit where it says so."""

import json
import warnings
from typing import get_args

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from condft import CondFTConfig, analyze, select_units
from condft.scores import Score


def train(model: nn.Module, ids: torch.Tensor, *, lr: float = 0.5, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained(tiny_llama, token_ids) -> PeftModel:
    model = get_peft_model(tiny_llama(), CondFTConfig(trainable_fraction=0.4))
    train(model, token_ids)
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_get_peft_model_trains_what_select_units_chooses(tiny_llama):
    base = tiny_llama()
    expected = select_units(analyze(base, progress=False), trainable_fraction=0.4)
    config = CondFTConfig(trainable_fraction=0.4)
    model = get_peft_model(base, config)
    assert config.target_units == list(expected.names)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == expected.num_parameters
    assert all(name.endswith("condft_weight.default") for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == expected.num_parameters


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
    monkeypatch.setattr("condft.tuner.model.analyze", lambda *_, **__: pytest.fail("analysed again"))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_fp32_copies_that_small_steps_move(tiny_llama, token_ids, dtype):
    base = tiny_llama().to(dtype)
    reference = logits(base, token_ids)
    model = get_peft_model(base, CondFTConfig(num_tensors=6))
    copies = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in copies} == {torch.float32}
    assert torch.equal(logits(model, token_ids), reference)
    before = [p.detach().clone() for p in copies]
    optimizer = torch.optim.AdamW(copies, lr=1e-5, weight_decay=0.0)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    moved = torch.cat([(p != b).flatten() for p, b in zip(copies, before, strict=True)]).float().mean()
    assert moved > 0.95


def test_autocast_adapter_dtype_false_is_respected(tiny_llama):
    model = get_peft_model(tiny_llama().bfloat16(), CondFTConfig(num_tensors=6), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_fp32_copies_over_bf16_survive_saving_bit_for_bit(tiny_llama, token_ids, tmp_path, low_cpu_mem_usage):
    model = get_peft_model(tiny_llama().bfloat16(), CondFTConfig(num_tensors=6))
    train(model, token_ids, lr=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    mine = {n: p for n, p in model.named_parameters() if "condft" in n}
    assert all(torch.equal(p, mine[n]) for n, p in loaded.named_parameters() if "condft" in n)


def test_autocast_trains(tiny_llama, token_ids):
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


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


def test_names_match_exactly_never_by_suffix():
    model = nn.ModuleDict({"lin": nn.Linear(3, 3), "sub": nn.ModuleDict({"lin": nn.Linear(3, 3)})})
    peft_model = get_peft_model(model, CondFTConfig(target_units=["lin.weight"]))
    assert [n for n, p in peft_model.named_parameters() if p.requires_grad] == [
        "base_model.model.lin.condft_weight.default"
    ]


def test_a_report_can_be_handed_over_as_object_or_file(tiny_llama, tmp_path):
    report = analyze(tiny_llama(), progress=False)
    report.save(tmp_path / "report.json")
    chosen = []
    for given in (None, report, str(tmp_path / "report.json")):
        config = CondFTConfig(num_tensors=7, report=given)
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
        chosen.append(config.target_units)
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_report_can_come_from_the_hub(tiny_llama, tmp_path, monkeypatch):
    report = analyze(tiny_llama(), progress=False)
    repository, revision = tmp_path / "models--someone--tiny", "0" * 40
    report.save(repository / "snapshots" / revision / "spectral_report.json")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert CondFTConfig(report="someone/tiny").load_report() == report
    assert CondFTConfig(report=str(repository / "snapshots" / revision)).load_report() == report
    with pytest.raises(FileNotFoundError, match=r"someone/nothing.* hand over its path, or leave report out"):
        CondFTConfig(report="someone/nothing").load_report()
    with pytest.raises(FileNotFoundError, match="no file, and no hub id either"):
        CondFTConfig(report=tmp_path / "no" / "report.json").load_report()


def test_a_report_of_other_weights_is_an_error(tiny_llama):
    report = analyze(tiny_llama(seed=1), progress=False)
    with pytest.raises(ValueError, match=r"not of this model: 0 of 28 .* and 28 have other values"):
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=7, report=report))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj' is near q_proj"),
        ({"target_modules": r".*\.nothing"}, "matches none of the 29 modules"),
        ({"trainable_fraction": 1e-5}, "trains nothing: the smallest of 28 candidate units has 512"),
        ({"target_modules": ["embed_tokens"]}, "tied to lm_head.weight"),
        ({"include_roles": ["embedding"]}, "tied to lm_head.weight"),
        ({"target_units": ["model.layers.9.mlp.up_proj.weight"]}, "do not exist in this base model"),
        ({"order": "lowset"}, "order='lowset' is unknown"),
    ],
)
def test_bad_configs_name_the_way_out(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), CondFTConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tensors": 3, "max_condition_number": 5.0}, "at most one budget"),
        ({"include_roles": ["heads"]}, r"include_roles=\['heads'\] is unknown"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "cannot narrow the pattern"),
    ],
)
def test_bad_configs_fail_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        CondFTConfig(**options)


def test_embeddings_and_heads_only_when_asked_for(tiny_llama):
    for options in ({"include_roles": ["output_head"], "target_modules": "lm_head"}, {"target_modules": ["lm_head"]}):
        config = CondFTConfig(**options)
        get_peft_model(tiny_llama(tied=False), config)
        assert config.target_units == ["lm_head.weight"]
    everything = CondFTConfig(num_tensors=1000, target_modules=".*")
    get_peft_model(tiny_llama(tied=False), everything)
    assert len(everything.target_units) == 28


def test_a_budget_of_everything_warns(tiny_llama):
    with pytest.warns(UserWarning, match="takes all 28 candidate weights"):
        get_peft_model(tiny_llama(), CondFTConfig())


def test_a_choice_of_shapes_warns_and_the_default_does_not(tiny_llama):
    with pytest.warns(UserWarning, match=r'shape, not learning, explains .*stratify="module_type"'):
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5, stratify=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5))
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5, stratify=None, score="relative_condition_number"))


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score_can_choose(tiny_llama, score):
    model = tiny_llama()
    expected = select_units(analyze(model, measures="all", progress=False), num_tensors=9, score=score)
    config = CondFTConfig(num_tensors=9, score=score)
    get_peft_model(model, config)
    assert config.target_units == list(expected.names)


def test_scope_of_target_modules(tiny_llama):
    for options, count in (
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, 2),
        ({"target_modules": "all-linear"}, 28),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 4),
        ({"target_modules": r".*\.2\.mlp\..*"}, 3),
    ):
        config = CondFTConfig(**options)
        get_peft_model(tiny_llama(), config)
        assert len(config.target_units) == count, options


def test_meta_weights_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"3 weights are on the meta device .* 'model.layers.1.mlp"):
        get_peft_model(model, CondFTConfig(num_tensors=3))


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


def test_registration_is_idempotent_and_real():
    import importlib

    import condft.tuner
    import condft.tuner.registration as registration

    importlib.reload(registration)
    registration.register(condft.tuner.CondFTConfig, condft.tuner.CondFTModel)
    assert PeftType("CONDFT") is PeftType.CONDFT
    assert PeftType.CONDFT.value == "CONDFT"
    assert "CONDFT" in list(PeftType)


def test_transformers_own_adapter_methods(tiny_llama, token_ids, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model, token_ids), logits(trained, token_ids))
    model.disable_adapters()
    assert torch.equal(logits(model, token_ids), logits(tiny_llama(), token_ids))
