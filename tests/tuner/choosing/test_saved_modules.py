"""Units in modules that `modules_to_save` trains whole, of the same adapter or of another one."""

from typing import Any

import pytest
from peft import get_peft_model

from condft import CondFTConfig

DOWN, QUERY = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
CONFLICT = r"weights of model\.layers\.1\.mlp\.down_proj are units .* trains model\.layers\.1\.mlp whole"


def test_units_in_modules_that_their_own_adapter_saves_are_refused(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match=CONFLICT):
        get_peft_model(tiny_llama(), CondFTConfig(target_units=[DOWN, QUERY], modules_to_save=["mlp"]))


def test_units_in_modules_that_another_adapter_saves_are_refused(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama(), CondFTConfig(target_units=[QUERY], modules_to_save=["mlp"]))
    with pytest.raises(ValueError, match=CONFLICT):
        model.add_adapter("second", CondFTConfig(target_units=[DOWN]))


def test_modules_with_another_adapters_units_are_not_saved(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama(), CondFTConfig(target_units=[DOWN]))
    with pytest.raises(ValueError, match=CONFLICT):
        model.add_adapter("second", CondFTConfig(target_units=[QUERY], modules_to_save=["mlp"]))


def test_the_selection_keeps_out_of_what_its_adapter_saves(tiny_llama: Any) -> None:
    config = CondFTConfig(num_tensors=28, modules_to_save=["mlp"])
    get_peft_model(tiny_llama(), config)
    assert len(config.target_units or ()) == 16
    assert not any("mlp" in name for name in config.target_units or ())
