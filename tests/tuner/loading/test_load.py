"""`load` loads base and adapter in one call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from condft import CondFTConfig
from condft.tuner import load
from tests.helpers.models.tiny_models import logits


@pytest.fixture
def saved(adapter: Any, tiny_llama: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A trained model whose base and adapter are saved in two folders."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapter(base=tiny_llama().from_pretrained(tmp_path / "base"), num_tensors=5)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path


@pytest.mark.parametrize("base", ["named in the config", "folder", "model"])
def test_base_and_adapter_in_one_call(saved: Any, tiny_llama: Any, token_ids: torch.Tensor, base: str) -> None:
    model, folder = saved
    given = {"named in the config": None, "folder": folder / "base", "model": tiny_llama()}[base]
    loaded = load(folder / "adapter", given)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_options_reach_the_base_and_the_adapter(saved: Any) -> None:
    _, folder = saved
    loaded = load(folder / "adapter", adapter_name="speech", is_trainable=True, dtype=torch.bfloat16)
    copies = [p for p in loaded.parameters() if p.requires_grad]
    assert len(copies) == 5
    assert {p.dtype for p in copies} == {torch.float32}
    assert loaded.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert loaded.active_adapter == "speech"


def test_what_cannot_be_loaded_names_the_way_out(saved: Any, tiny_llama: Any, tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(ValueError, match="loaded already: dtype cannot change it any more"):
        load(folder / "adapter", tiny_llama(), dtype=torch.bfloat16)
    plain = get_peft_model(nn.ModuleDict({"up": nn.Linear(3, 3)}), CondFTConfig(target_modules=["up"]))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"names no base model: .* condft.load\(adapter, base=...\)"):
        load(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"a ModuleDict of torch\.nn.*build it yourself"):
        load(tmp_path / "plain", "anything")
