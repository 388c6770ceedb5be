"""What `CondFTConfig` chooses, from which report, and how it refuses a choice that cannot be."""

import json
import warnings
from typing import get_args

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from condft import CondFTConfig, add_fisher_information, analyze, select_units
from condft.selection.scores import Score


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
        ({"target_modules": []}, r"target_modules=\[\] .* matches none of the 29 modules"),
        ({"target_modules": ""}, "target_modules='' .* matches none of the 29 modules"),
        ({"target_units": []}, r"target_units=\[\] trains nothing: name units, or leave it None"),
        ({"target_units": ["model.layers.9.mlp.up_proj.weight"]}, "do not exist in this base model"),
    ],
)
def test_bad_configs_name_the_way_out(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), CondFTConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tensors": 3, "target_units": ["lm_head.weight"]}, "so num_tensors=3 could not act: give one of them"),
        ({"num_tensors": 3, "max_condition_number": 5.0}, "at most one budget"),
        ({"order": "lowset"}, "order='lowset' is unknown"),
        ({"score": "kappa"}, "score='kappa' is unknown"),
        ({"stratify": "layer"}, "stratify='layer' is unknown"),
        ({"num_tensors": 0}, "num_tensors=0 selects nothing"),
        ({"num_tensors": 2.5}, "num_tensors=2.5 is no whole number"),
        ({"num_tensors": "3"}, "num_tensors='3' is no whole number"),
        ({"num_tensors": True}, "num_tensors=True is no whole number"),
        ({"trainable_fraction": 1.5}, r"trainable_fraction=1.5 is outside \(0, 1\]"),
        ({"trainable_fraction": "0.1"}, "trainable_fraction='0.1' is no number"),
        ({"max_condition_number": 0.5}, "max_condition_number=0.5 selects nothing"),
        ({"max_condition_number": "1e3"}, "max_condition_number='1e3' is no number"),
        ({"max_condition_number": 5, "order": "highest"}, "cannot go with score='condition_number', order='highest'"),
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_tensors", 9, "num_tensors was 5 when the 5 units .* were selected, and is 9 now: an adapter keeps its"),
        ("num_tensors", None, "num_tensors was 5 .* and is None now"),
        ("trainable_fraction", 0.5, "at most one budget|trainable_fraction was None .* and is 0.5 now"),
        ("order", "highest", "order was 'lowest' .* and is 'highest' now"),
    ],
)
def test_a_budget_changed_on_an_existing_adapter_is_refused(tiny_llama, tmp_path, name, value, message):
    """It could not act, on whichever way it is changed: the selection stands."""
    get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5)).save_pretrained(tmp_path)
    changed = CondFTConfig.from_pretrained(tmp_path)
    setattr(changed, name, value)
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), changed)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_saved_selection_is_read_though_its_rule_is_unknown_here(tiny_llama, tmp_path):
    """The score of a later version has chosen already; only a choice to be made anew needs it."""
    get_peft_model(tiny_llama(), CondFTConfig(num_tensors=5)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["score"] = saved["selected_by"]["score"] = "of_tomorrow"
    file.write_text(json.dumps(saved))
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    config = CondFTConfig.from_pretrained(tmp_path)
    config.target_units = None
    with pytest.raises(ValueError, match="score='of_tomorrow' is unknown"):
        get_peft_model(tiny_llama(), config)


def test_the_ways_out_of_a_changed_budget(tiny_llama):
    config = CondFTConfig(num_tensors=5)
    get_peft_model(tiny_llama(), config)
    config.num_tensors = 9
    config.num_tensors = 5
    get_peft_model(tiny_llama(), config)
    config.num_tensors, config.target_units = 9, None
    get_peft_model(tiny_llama(seed=1), config)
    assert len(config.target_units) == len(config.base_digests) == 9
    get_peft_model(tiny_llama(seed=1), config)
