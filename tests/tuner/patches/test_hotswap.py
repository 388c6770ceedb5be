"""`peft.utils.hotswap.hotswap_adapter` with CondFT adapters, compiled models included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from condft import CondFTConfig
from condft.tuner.registration import peft_type
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe


@pytest.fixture
def folders(tmp_path: Path, token_ids: Tensor) -> tuple[str, str]:
    """Two adapters of the same weights and the same saved module, trained for one step and for three."""
    for name, steps in (("one", 1), ("three", 3)):
        model = get_peft_model(build_tiny_llama(tied=False), CondFTConfig(num_tensors=4, modules_to_save=["lm_head"]))
        train(model, token_ids, steps=steps)
        model.save_pretrained(tmp_path / name)
    return str(tmp_path / "one"), str(tmp_path / "three")


def loaded(folder: str) -> PeftModel:
    return PeftModel.from_pretrained(build_tiny_llama(tied=False), folder)


def test_the_values_are_those_of_the_other_adapter(folders: tuple[str, str], token_ids: Tensor) -> None:
    one, three = folders
    model = loaded(one)
    before = [id(p) for p in model.parameters()]
    hotswap_adapter(model, three, "default", torch_device="cpu")
    assert torch.equal(logits(model, token_ids), logits(loaded(three), token_ids))
    assert [id(p) for p in model.parameters()] == before
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), logits(build_tiny_llama(tied=False), token_ids))


def test_a_compiled_model_is_not_compiled_again(folders: tuple[str, str], token_ids: Tensor) -> None:
    one, three = folders
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model: Any = torch.compile(loaded(one), backend=counter, fullgraph=True)
    torch.testing.assert_close(logits(model, token_ids), logits(loaded(one), token_ids))
    hotswap_adapter(model, three, "default", torch_device="cpu")
    torch.testing.assert_close(logits(model, token_ids), logits(loaded(three), token_ids))
    assert counter.frame_count == 1


def test_other_units_are_refused_with_the_way_out(folders: tuple[str, str], token_ids: Tensor, tmp_path: Path) -> None:
    model = loaded(folders[0])
    before = logits(model, token_ids)
    other = get_peft_model(build_tiny_llama(tied=False), CondFTConfig(num_tensors=4, order="highest"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trains \d units that the present one does not.*Load it under another name"):
        hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert torch.equal(logits(model, token_ids), before)
    model.load_adapter(str(tmp_path / "other"), "new")  # as the message says
    model.set_adapter("new")
    model.delete_adapter("default")
    assert torch.equal(logits(model, token_ids), logits(other, token_ids))


def test_other_experts_of_the_same_shape_are_refused(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{stack}[2]"])).save_pretrained(tmp_path)
    model = get_peft_model(tiny_moe(), CondFTConfig(target_units=[f"{stack}[1]"]))
    with pytest.raises(ValueError, match=r"trains 1 units that the present one does not, and lacks 1 of its 1"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


def test_merged_and_of_another_base_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    model = loaded(folders[0])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"while it is merged: call unmerge_adapter\(\) first"):
        hotswap_adapter(model, folders[1], "default", torch_device="cpu")
    model.unmerge_adapter()
    units = CondFTConfig.from_pretrained(folders[0]).target_units
    elsewhere = CondFTConfig(target_units=units, modules_to_save=["lm_head"])
    get_peft_model(build_tiny_llama(seed=3, tied=False), elsewhere).save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="made on another base model"):
        hotswap_adapter(model, str(tmp_path / "elsewhere"), "default", torch_device="cpu")


def test_peft_alone_swaps_lora_only(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, PEFT swaps adapters of other methods, and the patch may be unnecessary."""
    model = loaded(folders[0])
    with monkeypatch.context() as context:
        context.delitem(hotswap.CONFIG_KEYS_TO_CHECK, peft_type())
        with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA.* but CONDFT was passed"):
            hotswap_adapter(model, folders[1], "default", torch_device="cpu")
    monkeypatch.setattr(
        hotswap, "hotswap_adapter_from_state_dict", hotswap.hotswap_adapter_from_state_dict.__wrapped__
    )
    with pytest.raises(KeyError, match="lm_head"):  # it finds no LoRA parameter for the first tensor
        hotswap_adapter(model, folders[1], "default", torch_device="cpu")


def test_transformers_own_names_its_way_out(folders: tuple[str, str]) -> None:
    model = build_tiny_llama(tied=False)
    model.load_adapter(folders[0])
    with pytest.raises(ValueError, match=r"only supported for LoRA, please set `hotswap=False`"):
        model.load_adapter(folders[1], adapter_name="default", hotswap=True)


def test_lora_swaps_as_before(tmp_path: Path, token_ids: Tensor) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=4 + seed)
        get_peft_model(build_tiny_llama(), config).save_pretrained(tmp_path / str(seed))
    model, expected = (PeftModel.from_pretrained(build_tiny_llama(), tmp_path / name) for name in ("0", "1"))
    hotswap_adapter(model, str(tmp_path / "1"), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model, token_ids), logits(expected, token_ids))
