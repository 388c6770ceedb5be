"""`PeftModel.load_adapter` onto an adapter that exists is checked; PEFT itself compares no configs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from condft import CondFTConfig
from condft.tuner.patches.load_adapter import check_before_loading
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, train

STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture
def trained(tmp_path: Path, token_ids: Tensor) -> Path:
    """The folder of a trained adapter of one expert."""
    model = get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{STACK}[2]"]))
    train(model, token_ids, steps=1)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_peft_alone_loads_one_expert_into_another(trained: Path, token_ids: Tensor) -> None:
    """If this fails, PEFT compares the configs itself, and the patch may be unnecessary."""
    model = get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{STACK}[1]"]))
    before = logits(model, token_ids)
    unpatched: Any = PeftModel.load_adapter.__wrapped__  # type: ignore[attr-defined]
    unpatched(model, str(trained), "default")
    assert not torch.equal(logits(model, token_ids), before)  # expert 1 computes with the values of expert 2


def test_with_the_patch_it_is_refused(trained: Path, token_ids: Tensor) -> None:
    model = get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{STACK}[1]"]))
    before = logits(model, token_ids)
    with pytest.raises(ValueError, match="cannot load into 'default'"):
        model.load_adapter(str(trained), "default")
    assert torch.equal(logits(model, token_ids), before)


def test_other_methods_and_further_calls_change_nothing(tmp_path: Path, token_ids: Tensor) -> None:
    patched = PeftModel.load_adapter
    check_before_loading(LoraConfig, lambda *args: pytest.fail("a second patch was made"))
    assert PeftModel.load_adapter is patched
    lora = get_peft_model(build_tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_tiny_llama(), tmp_path)
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model, token_ids), logits(lora, token_ids))
