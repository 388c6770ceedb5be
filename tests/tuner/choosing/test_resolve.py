"""What `resolve` selects, from which report, and which selections it refuses."""

import warnings
from typing import get_args

import pytest
from peft import get_peft_model
from torch import nn

from condft import CondFTConfig, add_fisher_information, analyze, select_units
from condft.selection.scores import Score
from condft.tuner.choosing.resolve import resolve
from condft.tuner.targets import Targets
from condft.weights import walk as walk_module
from tests.helpers.models.tiny_models import tiny_moe


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


def test_names_match_exactly_never_by_suffix():
    model = nn.ModuleDict({"lin": nn.Linear(3, 3), "sub": nn.ModuleDict({"lin": nn.Linear(3, 3)})})
    peft_model = get_peft_model(model, CondFTConfig(target_units=["lin.weight"]))
    assert [n for n, p in peft_model.named_parameters() if p.requires_grad] == [
        "base_model.model.lin.condft_weight.default"
    ]


def test_a_report_can_be_handed_over_as_object_or_file(tiny_llama, tmp_path):
    report = analyze(tiny_llama(), progress=False)
    report.save(tmp_path / "report.json")
    selected = []
    for given in (None, report, str(tmp_path / "report.json")):
        config = CondFTConfig(num_tensors=7, report=given)
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
        selected.append(config.target_units)
    assert selected[0] == selected[1] == selected[2]


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
        ({"target_modules": []}, r"target_modules=\[\] .* matches none of the 29 modules"),
        ({"target_modules": ""}, "target_modules='' .* matches none of the 29 modules"),
        ({"target_units": []}, r"target_units=\[\] trains nothing: name units, or leave it None"),
        ({"target_units": ["model.layers.9.mlp.up_proj.weight"]}, "do not exist in this base model"),
    ],
)
def test_bad_configs_name_the_way_out(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), CondFTConfig(**options))


def test_embeddings_and_heads_only_if_named(tiny_llama):
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


def test_a_selection_by_shape_warns_and_the_default_does_not(tiny_llama):
    with pytest.warns(UserWarning, match=r'shape, not learning, explains .*stratify="module_type"'):
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5, stratify=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5))
        get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5, stratify=None, score="relative_condition_number"))


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score_can_select(tiny_llama, score):
    model = tiny_llama()
    report = add_fisher_information(analyze(model, measures="all", progress=False), model, progress=False)
    expected = select_units(report, num_tensors=9, score=score)
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


def test_the_model_is_walked_once(tiny_llama, monkeypatch):
    walks, items = [], walk_module._Walk.items
    monkeypatch.setattr(walk_module._Walk, "items", lambda walk: walks.append(walk) or items(walk))
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5))
    assert len(walks) == 1
    report = analyze(tiny_llama(), progress=False)
    assert len(walks) == 2
    model.add_adapter("from a report", CondFTConfig(num_tensors=3, report=report))
    assert len(walks) == 3
    model.add_adapter("by hand", CondFTConfig(target_units=["model.layers.0.mlp.up_proj.weight"]))
    assert len(walks) == 3


@pytest.mark.parametrize(
    ("build", "granularity"), [("tiny_llama", "tensor"), ("tiny_llama", "head"), ("moe", "tensor")]
)
def test_the_report_is_that_of_analyze(tiny_llama, build, granularity):
    model = tiny_moe() if build == "moe" else tiny_llama()
    config = CondFTConfig(num_tensors=6, granularity=granularity)
    found = resolve(config, model, Targets(model))
    whole = analyze(model, granularity=granularity, progress=False)
    candidates = [row.name for row in whole.rows if row.role in ("layer", "expert")]
    report = analyze(model, names=candidates, granularity=granularity, progress=False)
    assert found.report_fingerprint == report.fingerprint
    assert found.target_units == select_units(whole, num_tensors=6).names
    assert found.base_digests == {name: f"float32 {report[name].digest}" for name in found.target_units}


def test_the_config_is_not_changed_and_the_model_writes_what_is_returned(tiny_llama):
    config, model = CondFTConfig(num_tensors=5, target_modules=["q_proj", "lm_head"]), tiny_llama(tied=False)
    before = vars(config).copy()
    found = resolve(config, model, Targets(model))
    assert vars(config) == before
    get_peft_model(model, config)
    assert (config.target_units, config.target_modules) == (list(found.target_units), None)
    assert (config.base_digests, config.selected_by) == (found.base_digests, found.selected_by)
    assert config.report_fingerprint == found.report_fingerprint


def test_a_refused_adapter_leaves_its_config_without_a_selection(tiny_llama):
    config = CondFTConfig(num_tensors=5, modules_to_save=["lm_head"])  # tied to the embedding
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        get_peft_model(tiny_llama(), config)
    assert config.target_units is None
    assert config.base_digests is None
    assert not config.is_filled_in
