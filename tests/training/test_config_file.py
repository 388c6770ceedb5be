"""YAML to a typed configuration: every mistake is named, with what is valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from condft.training import load_config


def test_unknown_key_names_file_key_and_closest(load_sections: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c\.yaml: unknown key 'training\.stepz'; did you mean 'training\.steps'\?"):
        load_sections(training={"stepz": 3})
    with pytest.raises(ValueError, match=r"'training\.learning_rate\.projectr'; did you mean .*\.projector'"):
        load_sections(training={"learning_rate": {"projectr": 0.1}})
    with pytest.raises(ValueError, match=r"'training\.self_distillation\.wieght'; did you mean .*\.weight'"):
        load_sections(training={"self_distillation": {"wieght": 0.1}})
    with pytest.raises(ValueError, match=r"unknown key 'trainig'; did you mean 'training'\?"):
        load_sections(trainig={"steps": 1})
    with pytest.raises(ValueError, match=r"unknown key 'data\.zzz'; valid: audio_column, dataset"):
        load_sections(data={"zzz": 3})


def test_all_problems_are_named_at_once(load_sections: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'data\.foo'") as caught:
        load_sections(data={"foo": 1}, training={"steps": "ten"})
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
def test_wrong_value_names_key_value_and_expected(
    load_sections: Any, section: str, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_sections(**{section: {key: value}})


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
        ("seed: 1\nseed: 2\n", 'line 2: .*duplicate key "seed"'),
        ("data:\n  manifest: a\n  manifest: b\n", 'line 3: .*duplicate key "manifest"'),
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


def test_overrides_replace_and_add(load_sections: Any) -> None:
    config = load_sections("training.steps=10", "tuning.stratify=null", "tuning.trainable_fraction=1e-1", "seed=7")
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
def test_bad_override_is_named(load_sections: Any, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_sections(override, seed=1)
