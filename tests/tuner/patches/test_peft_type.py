"""PEFT's enum of methods gets a real member; PEFT itself refuses a method that has none."""

import copy

import pytest
from peft.utils import PeftType, register_peft_method

from condft.tuner import CondFTConfig, CondFTModel
from condft.tuner.patches.peft_type import add_peft_type


def test_peft_registers_no_method_without_a_member() -> None:
    """If this fails, PEFT takes methods of other packages, and the patch may be unnecessary."""
    with pytest.raises(ValueError, match="Unknown PEFT type OURS, please add an entry"):
        register_peft_method(name="ours", config_cls=CondFTConfig, model_cls=CondFTModel)


def test_the_member_is_as_good_as_peft_s_own() -> None:
    member = add_peft_type("CONDFT")
    assert member is add_peft_type("CONDFT") is PeftType("CONDFT") is PeftType["CONDFT"]
    assert isinstance(member, str)
    assert (member.name, member.value) == ("CONDFT", "CONDFT")
    assert list(PeftType).count(member) == 1
    assert copy.deepcopy(member) is member
