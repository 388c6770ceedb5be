"""`model.load_adapter(folder, name)` where the model has an adapter of that name: same units and base, or an error."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, train

STACK = "model.layers.0.mlp.experts.down_proj"
HEADS = "model.layers.0.self_attn.q_proj.weight"
BASES = {STACK: tiny_moe, HEADS: build_tiny_llama}


def save(folder: Path, units: list[str], ids: Tensor, *, base: nn.Module, steps: int = 1) -> Tensor:
    """Trains and saves an adapter; returns its logits."""
    model = get_peft_model(base, CondFTConfig(target_units=units))
    train(model, ids, steps=steps)
    model.save_pretrained(folder)
    return logits(model, ids)


@pytest.mark.parametrize(("parameter", "part"), [(STACK, "{}"), (HEADS, "h{}")])
def test_other_slices_of_the_same_shape_are_refused(
    parameter: str, part: str, tmp_path: Path, token_ids: Tensor
) -> None:
    build = BASES[parameter]
    here, there = ([f"{parameter}[{part.format(i)}]", f"{parameter}[{part.format(i + 1)}]"] for i in (0, 1))
    before = save(tmp_path / "here", here, token_ids, base=build())
    others = save(tmp_path / "there", there, token_ids, base=build())
    model = PeftModel.from_pretrained(build(), tmp_path / "here")
    with pytest.raises(
        ValueError, match=r"cannot load into 'default': .* trains 1 units .* lacks 1 of its 2 .* Load it under another"
    ):
        model.load_adapter(tmp_path / "there", "default")
    assert torch.equal(logits(model, token_ids), before)
    model.load_adapter(tmp_path / "there", "other")  # as the message says
    model.set_adapter("other")
    assert torch.equal(logits(model, token_ids), others)


def test_the_same_units_are_loaded_as_before(tmp_path: Path, token_ids: Tensor) -> None:
    units = [f"{STACK}[2]", f"{STACK}[0]"]
    save(tmp_path / "one", units, token_ids, base=tiny_moe())
    further = save(tmp_path / "further" / "deep", units[::-1], token_ids, base=tiny_moe(), steps=3)
    model = PeftModel.from_pretrained(tiny_moe(), tmp_path / "one")
    model.load_adapter(tmp_path / "further", "default", subfolder="deep")
    assert torch.equal(logits(model, token_ids), further)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, token_ids: Tensor) -> None:
    units = [f"{STACK}[1]"]
    save(tmp_path / "elsewhere", units, token_ids, base=tiny_moe(seed=3))
    model = get_peft_model(tiny_moe(), CondFTConfig(target_units=units))
    with pytest.raises(ValueError, match="made on another base model"):
        model.load_adapter(tmp_path / "elsewhere", "default")
    assert torch.equal(logits(model, token_ids), logits(tiny_moe(), token_ids))


def test_a_config_that_is_passed_must_be_the_files(tmp_path: Path, token_ids: Tensor) -> None:
    expected = save(tmp_path / "saved", [f"{STACK}[1]"], token_ids, base=tiny_moe())
    other = CondFTConfig(target_units=[f"{STACK}[2]"])
    with pytest.raises(ValueError, match="cannot load into 'default'"):
        PeftModel.from_pretrained(tiny_moe(), tmp_path / "saved", config=other)
    # without a config in the folder nothing can be compared
    config = CondFTConfig.from_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "bare")
    model = PeftModel.from_pretrained(tiny_moe(), tmp_path / "bare", config=config)
    assert torch.equal(logits(model, token_ids), expected)
