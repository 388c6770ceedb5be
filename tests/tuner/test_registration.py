"""CONDFT in PEFT's tables: entered once, and found by every way that PEFT looks a method up."""

import importlib

import pytest
from peft import PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import condft.tuner
from condft import CondFTConfig
from condft.tuner import registration


def test_registration_is_idempotent_and_real():
    importlib.reload(registration)
    registration.register(condft.tuner.CondFTConfig, condft.tuner.CondFTModel)
    assert PeftType("CONDFT") is PeftType.CONDFT
    assert PeftType.CONDFT.value == "CONDFT"
    assert "CONDFT" in list(PeftType)


def test_peft_finds_the_method_by_its_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CONDFT] is CondFTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CONDFT] is condft.tuner.CondFTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CONDFT] == registration.PREFIX
    assert isinstance(get_peft_config({"peft_type": "CONDFT", "num_tensors": 3}), CondFTConfig)


def test_another_type_is_still_unknown():
    with pytest.raises(ValueError, match="CONDFU"):
        PeftType("CONDFU")
