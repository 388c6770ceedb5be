"""An adapter knows the base that it was made on, and is refused on another one unless the caller asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig, analyze
from condft.tuner import load
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe

OTHER = r"on another base model \(unnamed\): {} of the {} weights that it replaces have other values here, the first"


def units(folder: Path) -> list[str]:
    names: list[str] = json.loads((folder / "adapter_config.json").read_text())["target_units"]
    return names


def test_another_base_is_refused_by_every_way_to_load(saved_adapter: Path) -> None:
    first = units(saved_adapter)[0]
    message = OTHER.format(5, 5) + f" is '{first}'"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build_tiny_llama(seed=3), saved_adapter)
    with pytest.raises(ValueError, match=message):
        build_tiny_llama(seed=3).load_adapter(str(saved_adapter))
    with pytest.raises(ValueError, match=message):
        load(saved_adapter, build_tiny_llama(seed=3))
    with pytest.raises(ValueError, match=message):
        get_peft_model(build_tiny_llama(seed=3), CondFTConfig.from_pretrained(saved_adapter))


def test_one_changed_weight_is_enough_and_others_do_not_count(saved_adapter: Path, token_ids: Tensor) -> None:
    base, names = build_tiny_llama(), units(saved_adapter)
    with torch.no_grad():
        base.model.norm.weight.mul_(2.0)  # not hashed: only what is replaced is
        base.get_parameter(names[2])[3, 5] += 1e-3
    with pytest.raises(ValueError, match=OTHER.format(1, 5) + f" is '{names[2]}'"):
        PeftModel.from_pretrained(base, saved_adapter)


def test_the_way_out_and_then_it_belongs_to_the_new_base(saved_adapter: Path, tmp_path: Path) -> None:
    other = build_tiny_llama(seed=3)
    config = CondFTConfig.from_pretrained(saved_adapter)
    config.base_digests = None
    PeftModel.from_pretrained(other, saved_adapter, config=config).save_pretrained(tmp_path / "moved")
    PeftModel.from_pretrained(build_tiny_llama(seed=3), tmp_path / "moved")
    with pytest.raises(ValueError, match=OTHER.format(5, 5)):
        PeftModel.from_pretrained(build_tiny_llama(), tmp_path / "moved")
    assert isinstance(load(saved_adapter, build_tiny_llama(seed=3), check_base=False), PeftModel)


@pytest.mark.parametrize("options", [{"num_tensors": 3}, {"target_units": ["model.layers.3.mlp.up_proj.weight"]}])
@pytest.mark.parametrize("other", [{"seed": 3}, {"layers": 1}])
def test_a_config_that_was_used_on_another_model_has_its_own_message(
    options: dict[str, Any], other: dict[str, int]
) -> None:
    config = CondFTConfig(**options)
    get_peft_model(build_tiny_llama(), config)
    get_peft_model(build_tiny_llama(), config)  # the same weights
    with pytest.raises(ValueError, match=r"this CondFTConfig was .* on another model .*: make a new"):
        get_peft_model(build_tiny_llama(**other), config)
    if "num_tensors" in options:
        config.target_units = config.base_digests = None
        get_peft_model(build_tiny_llama(**other), config)


@pytest.mark.parametrize(
    ("made_on", "loaded_on", "is_compared"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
    ],
)
def test_another_dtype_is_the_same_base_and_another_base_is_found_if_the_bits_show_it(
    made_on: torch.dtype, loaded_on: torch.dtype, is_compared: bool, tmp_path: Path
) -> None:
    get_peft_model(build_tiny_llama().to(made_on), CondFTConfig(num_tensors=3)).save_pretrained(tmp_path)
    # As from_pretrained(dtype=...) does it: each from the checkpoint's own fp32 values.
    PeftModel.from_pretrained(build_tiny_llama().to(loaded_on), tmp_path)
    PeftModel.from_pretrained(build_tiny_llama().to(made_on).to(loaded_on), tmp_path)
    other = build_tiny_llama(seed=3).to(loaded_on)
    if is_compared:
        with pytest.raises(ValueError, match=OTHER.format(3, 3)):
            PeftModel.from_pretrained(other, tmp_path)
    else:
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_digests_are_those_of_the_report_however_the_units_were_chosen(granularity: Any) -> None:
    """Experts and heads too: a selection by hand hashes what the analysis hashed."""
    model = tiny_moe() if granularity == "tensor" else build_tiny_llama()
    rows = {row.name: row for row in analyze(model, granularity=granularity, progress=False).rows}
    chosen = CondFTConfig(num_tensors=9, granularity=granularity)
    get_peft_model(model, chosen)
    assert chosen.target_units is not None
    assert any("[" in name for name in chosen.target_units)
    assert chosen.base_digests == {name: f"float32 {rows[name].digest}" for name in chosen.target_units}
    again = tiny_moe() if granularity == "tensor" else build_tiny_llama()
    by_hand = CondFTConfig(target_units=chosen.target_units)
    get_peft_model(again, by_hand)
    assert by_hand.base_digests == chosen.base_digests


def test_a_change_of_another_expert_is_allowed(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{stack}[1]"])).save_pretrained(tmp_path)
    base = tiny_moe()
    with torch.no_grad():
        base.get_parameter(stack)[2].mul_(2.0)
    PeftModel.from_pretrained(base, tmp_path)
    base = tiny_moe()
    with torch.no_grad():
        base.get_parameter(stack)[1].mul_(2.0)
    with pytest.raises(ValueError, match=OTHER.format(1, 1)):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_merged_adapter_does_not_make_it_another_base(saved_adapter: Path, token_ids: Tensor) -> None:
    model = PeftModel.from_pretrained(build_tiny_llama(), saved_adapter)
    adapted = logits(model, token_ids)
    model.merge_adapter()
    model.load_adapter(str(saved_adapter), "again")
    model.unmerge_adapter()
    model.set_adapter("again")
    assert torch.equal(logits(model, token_ids), adapted)


def test_values_on_the_meta_device_are_not_compared(saved_adapter: Path) -> None:
    base: nn.Module = build_tiny_llama(seed=3).to("meta")
    config = CondFTConfig.from_pretrained(saved_adapter)
    get_peft_model(base, config)
    by_hand = CondFTConfig(target_units=units(saved_adapter))
    get_peft_model(build_tiny_llama().to("meta"), by_hand)
    assert by_hand.base_digests == {}
