"""Proof of freeze: a changed base tensor is seen, and PEFT's wrapping changes no base tensor's name."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from condft import CondFTConfig
from condft.training import checksum_tensors, compare_checksums, frozen_tensors


def checksums(model: torch.nn.Module) -> dict[str, str]:
    return checksum_tensors(frozen_tensors(model), progress=False)


@pytest.mark.parametrize("method", ["lora", "condft"])
def test_a_wrapped_model_holds_every_base_tensor_unchanged(audio_llm: Any, method: str) -> None:
    model = audio_llm()
    before = checksums(model)
    assert len(before) == len(list(model.named_parameters(remove_duplicate=False))) + len(list(model.named_buffers()))
    config = (
        LoraConfig(target_modules=["q_proj", "linear_1"], modules_to_save=["multi_modal_projector"])
        if method == "lora"
        else CondFTConfig(trainable_fraction=0.3, stratify=None, modules_to_save=["multi_modal_projector"])
    )
    model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    report = compare_checksums(before, checksums(model))
    assert report.unchanged
    assert report.checked == len(before)
    assert set(checksums(model)) == set(before)

    frozen = next(p for n, p in model.named_parameters() if n.endswith("v_proj.base_layer.weight") or "k_proj" in n)
    with torch.no_grad():
        frozen.view(-1)[0] += 1e-3
    broken = compare_checksums(before, checksums(model))
    assert not broken.unchanged
    assert len(broken.changed) == 1
    assert broken.missing == []


def test_missing_and_unprovable() -> None:
    report = compare_checksums({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
    assert (report.unchanged, report.checked, report.changed, report.missing) == (False, 1, ["b"], ["a"])
    with pytest.raises(ValueError, match="no checksums from before"):
        compare_checksums({}, {"a": "1"})
    with pytest.raises(ValueError, match="far is on the meta device"):
        checksum_tensors([("far", torch.empty(2, device="meta"))])
    with pytest.raises(ValueError, match="two tensors have the name 'a'"):
        checksum_tensors([("a", torch.zeros(1)), ("a", torch.ones(1))])
