"""YAML to a typed configuration: every slip is named, with the way out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from condft.training import RunConfig, load_config


@pytest.fixture
def load(tmp_path: Path, content: dict[str, Any]) -> Any:
    def load(*overrides: str, **sections: Any) -> RunConfig:
        merged = copy.deepcopy(content)
        for name, value in sections.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(merged))
        return load_config(path, overrides)

    return load


def test_defaults_are_filled_in(load: Any) -> None:
    config = load()
    assert config.training.learning_rate.language_model == 1e-2
    assert config.evaluation.text == "pydoc"
    assert config.tuning == {}
    assert not config.model.trust_remote_code


def test_unknown_key_names_file_key_and_closest(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.yaml: unknown key 'training\.stepz'; did you mean 'training\.steps'\?"):
        load(training={"stepz": 3})
    with pytest.raises(ValueError, match=r"'training\.learning_rate\.projectr'; did you mean .*\.projector'"):
        load(training={"learning_rate": {"projectr": 0.1}})
    with pytest.raises(ValueError, match=r"'training\.self_distillation\.wieght'; did you mean .*\.weight'"):
        load(training={"self_distillation": {"wieght": 0.1}})
    with pytest.raises(ValueError, match=r"unknown key 'trainig'; did you mean 'training'\?"):
        load(trainig={"steps": 1})
    with pytest.raises(ValueError, match=r"unknown key 'data\.zzz'; valid: audio_column, dataset"):
        load(data={"zzz": 3})


def test_all_problems_are_told_at_once(load: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'data\.foo'") as caught:
        load(data={"foo": 1}, training={"steps": "ten"})
    assert "'training.steps' is 'ten' (str), expected integer" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "steps", "10", r"'training.steps' is '10' \(str\), expected integer"),
        ("training", "steps", 1.5, r"'training.steps' is 1.5 \(float\), expected integer"),
        ("training", "steps", True, r"'training.steps' is True \(bool\), expected integer"),
        ("training", "per_device_batch_size", 0, "expected greater than or equal to 1"),
        ("training", "schedule", "cosinus", "'training.schedule' is 'cosinus' .* 'cosine', 'linear' or 'constant'"),
        ("model", "trust_remote_code", "yes", r"'model.trust_remote_code' is 'yes' \(str\), expected boolean"),
        ("training", "max_grad_norm", float("inf"), r"'training.max_grad_norm' is inf \(float\), expected a finite"),
        ("training", "learning_rate", {"projector": float("inf")}, "'training.learning_rate.projector' is inf"),
        ("data", "max_seconds", float("inf"), "'data.max_seconds' is inf"),
        ("data", "max_seconds", float("nan"), "'data.max_seconds' is nan"),
        ("tuning", "trainable_fraction", float("nan"), "'tuning.trainable_fraction' is nan, expected a finite number"),
        ("data", "dataset", "fleurs", "exactly one of data.manifest and data.dataset"),
        ("data", "manifest", None, "exactly one of data.manifest and data.dataset"),
        (
            "data",
            "dataset_split_test",
            "train",
            "dataset_split_train and data.dataset_split_test are both 'train'",
        ),
    ],
)
def test_wrong_value_names_key_value_and_expected(load: Any, section: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**{section: {key: value}})


def test_a_seed_leaves_room_for_those_derived_from_it(load: Any) -> None:
    """numpy takes them up to 2**32; stages and ranks count on from the run's."""
    assert load(seed=2**31 - 1).seed == 2**31 - 1
    with pytest.raises(ValueError, match="'seed' is 4294967295"):
        load(seed=2**32 - 1)


def test_nothing_to_train_is_an_error(load: Any) -> None:
    with pytest.raises(ValueError, match="training: projector_steps and steps are both 0"):
        load(training={"projector_steps": 0, "steps": 0})


def test_missing_key_and_missing_file(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["training"]["steps"], content["model"]
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="missing key 'model'") as caught:
        load_config(path)
    assert "missing key 'training.steps'" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' stands here twice"),
        ("data:\n  manifest: a\n  manifest: b\n", "key 'manifest' stands here twice"),
        ("a: [1", "not valid YAML"),
        ("", "expected a mapping of sections, found NoneType"),
        ("- 1\n", "expected a mapping of sections, found list"),
        ("1: 2\n", "key 1 is not a string"),
        ("x: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_broken_yaml_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)broken.yaml.*{message}"):
        load_config(path)


def test_numbers_and_booleans_are_read_as_yaml_1_2(tmp_path: Path, content: dict[str, Any]) -> None:
    """PyYAML alone reads `1e-3` as a string and `no` as False."""
    del content["training"]["mixed_precision"], content["training"]["learning_rate"]
    text = yaml.safe_dump(content)
    training = "training:\n  mixed_precision: no\n  learning_rate: {projector: 1e-3, language_model: +.5}\n"
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("training:\n", training))
    config = load_config(path)
    assert config.training.mixed_precision == "no"
    assert config.training.learning_rate.projector == 1e-3
    assert config.training.learning_rate.language_model == 0.5


def test_overrides_replace_and_add(load: Any) -> None:
    config = load("training.steps=10", "tuning.stratify=null", "tuning.trainable_fraction=1e-1", "seed=7")
    assert config.training.steps == 10
    assert config.seed == 7
    assert config.tuning == {"stratify": None, "trainable_fraction": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "not of the form section.key=value"),
        ("training..steps=1", "not of the form"),
        ("seed.x=1", "'seed' holds a value, not a section"),
        ("training.stepz=1", "did you mean 'training.steps'"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_override_is_named(load: Any, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override, seed=1)


def test_fingerprint_and_diff_ignore_only_the_output_dir(load: Any) -> None:
    config = load(tuning={"score": "condition_number"})
    moved = load("output_dir=elsewhere", tuning={"score": "condition_number"})
    changed = load("training.steps=9", "tuning.order=highest", tuning={"score": "condition_number"})
    assert config.fingerprint() == moved.fingerprint()
    assert config.diff(moved) == []
    assert config.fingerprint() != changed.fingerprint()
    assert config.diff(changed) == changed.diff(config.to_dict()) == ["training.steps", "tuning.order"]


def test_mixed_precision_auto(load: Any) -> None:
    auto = load("training.mixed_precision=auto").training
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert auto.resolve_mixed_precision() == ("bf16" if on_gpu else "no")
    assert load("training.mixed_precision=fp16").training.resolve_mixed_precision() == "fp16"
