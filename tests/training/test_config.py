"""The sections of a run's configuration: defaults, descriptions, fingerprints, and a YAML that is read back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from condft.training import RunConfig, load_config


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and every section below it."""
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


@pytest.mark.parametrize("section", list(sections(RunConfig)), ids=lambda section: section.__name__)
def test_every_setting_is_described(section: type[BaseModel]) -> None:
    """The YAML reference is made from the descriptions."""
    assert [name for name, field in section.model_fields.items() if not field.description] == []
    assert section.__doc__


def test_a_configuration_is_written_so_that_it_reads_back(load_sections: Any, tmp_path: Path) -> None:
    """Also values that YAML could take for numbers or booleans."""
    config = load_sections(model={"prompt": "1e-3", "system_prompt": "no"}, tuning={"trainable_fraction": 1e-5})
    path = tmp_path / "written.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_defaults_are_filled_in(load_sections: Any) -> None:
    config = load_sections()
    assert config.training.learning_rate.language_model == 1e-2
    assert config.evaluation.text == "pydoc"
    assert config.tuning == {}
    assert not config.model.trust_remote_code


def test_a_seed_leaves_room_for_those_derived_from_it(load_sections: Any) -> None:
    """numpy takes them up to 2**32; stages and ranks count on from the run's."""
    assert load_sections(seed=2**31 - 1).seed == 2**31 - 1
    with pytest.raises(ValueError, match="'seed' is 4294967295"):
        load_sections(seed=2**32 - 1)


def test_nothing_to_train_is_an_error(load_sections: Any) -> None:
    with pytest.raises(ValueError, match="training: projector_steps and steps are both 0"):
        load_sections(training={"projector_steps": 0, "steps": 0})


def test_fingerprint_and_diff_ignore_only_the_output_dir(load_sections: Any) -> None:
    config = load_sections(tuning={"score": "condition_number"})
    moved = load_sections("output_dir=elsewhere", tuning={"score": "condition_number"})
    changed = load_sections("training.steps=9", "tuning.order=highest", tuning={"score": "condition_number"})
    assert config.fingerprint() == moved.fingerprint()
    assert config.diff(moved) == []
    assert config.fingerprint() != changed.fingerprint()
    assert config.diff(changed) == changed.diff(config.to_dict()) == ["training.steps", "tuning.order"]


def test_mixed_precision_auto(load_sections: Any) -> None:
    auto = load_sections("training.mixed_precision=auto").training
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert auto.resolve_mixed_precision() == ("bf16" if on_gpu else "no")
    assert load_sections("training.mixed_precision=fp16").training.resolve_mixed_precision() == "fp16"
