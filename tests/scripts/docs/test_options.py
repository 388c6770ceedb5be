"""The pages of the options say what the classes say."""

import dataclasses
from typing import Literal

import pytest
from peft.config import PeftConfig
from pydantic import BaseModel, Field

from condft.training.config import RunConfig, flatten
from condft.tuner import CondFTConfig
from scripts.docs.options import GROUPS, config_page, rows_of, yaml_page


def test_every_argument_is_in_one_group() -> None:
    own = {field.name for field in dataclasses.fields(CondFTConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(own)
    assert config_page().count("| `num_tensors` | `None` | ") == 1


def test_every_key_of_the_quickstart_is_on_the_page() -> None:
    least = {"output_dir": "runs/x", "model": {"language_model": "a", "audio_tower": "b"}}
    config = RunConfig.model_validate({**least, "data": {"manifest": "m"}, "training": {"steps": 1}})
    page = yaml_page()
    missing = [key for key in flatten(config.to_dict()) if f"`{key}`" not in page]
    assert missing == []


class _Example(BaseModel):
    steps: int = Field(ge=1, lt=9, description="How many.")
    rate: float | None = Field(default=None, gt=0, description="How fast.")
    kind: Literal["a", "b"] = Field(default="a", description="Which.")
    quick: bool = Field(default=True, description="Or slow.")


def test_types_bounds_and_defaults_are_those_of_the_model() -> None:
    assert rows_of(_Example, "x.") == [
        ["`x.steps`", "whole number, ≥ 1, < 9", "required", "How many."],
        ["`x.rate`", "number or null, > 0", "`null`", "How fast."],
        ["`x.kind`", "`a`, `b`", "`a`", "Which."],
        ["`x.quick`", "true or false", "`true`", "Or slow."],
    ]


def test_a_key_without_a_meaning_is_refused() -> None:
    class Mute(BaseModel):
        steps: int = 1

    with pytest.raises(ValueError, match=r"Mute\.steps has no description"):
        rows_of(Mute, "")
