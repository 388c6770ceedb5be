"""`CondFTConfig`: what it refuses, what it saves, and what may change once it has a selection."""

import copy
import dataclasses
import json

import pytest
from peft import PeftConfig, PeftModel, get_peft_model

from condft import CondFTConfig, analyze


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
    """It would have no effect: the adapter keeps its selection. On the object and in the file alike."""
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
    """A score of a later version has made the selection; only a new selection needs it."""
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


def test_a_report_and_what_happened_to_the_object_are_not_saved(tiny_llama, tmp_path):
    config = CondFTConfig(num_tensors=5, report=analyze(tiny_llama(), progress=False))
    assert not config.is_filled_in
    assert config.to_dict()["report"] is None
    get_peft_model(tiny_llama(), config)
    assert config.is_filled_in
    assert config.report is None
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "is_filled_in" not in saved
    assert saved["report"] is None
    again = PeftConfig.from_pretrained(tmp_path)
    assert not again.is_filled_in
    assert again == config  # what was filled in is equal; where it came from is no part of it
    assert copy.deepcopy(config).is_filled_in
    assert not dataclasses.replace(config).is_filled_in


def test_an_object_that_one_model_filled_in_is_refused_by_another(tiny_llama):
    config = CondFTConfig(num_tensors=5)
    get_peft_model(tiny_llama(), config)
    get_peft_model(tiny_llama(), config)  # of the same weights
    with pytest.raises(ValueError, match=r"filled in on another model already: of its 5 target_units 5 have other"):
        get_peft_model(tiny_llama(seed=1), config)


def test_nothing_but_fields_and_the_one_documented_attribute(tiny_llama):
    config = CondFTConfig(num_tensors=5)
    get_peft_model(tiny_llama(), config)
    fields = {field.name for field in dataclasses.fields(config)}
    assert vars(config).keys() - fields == {"is_filled_in"}


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"score": "fisher_information"}, True),
        ({}, False),
        ({"score": "fisher_information", "order": "random"}, False),
        ({"score": "fisher_information", "target_units": ["0.weight"]}, False),
    ],
)
def test_fisher_information_is_needed_only_to_rank(options, needed):
    assert CondFTConfig(**options).ranks_by_fisher_information is needed
