"""An adapter that an earlier commit saved loads, and computes what it computed there.

Commit f5a3e70 saved `tests/helpers/stored/adapter_f5a3e70` (torch 2.13, transformers 5.23, peft 0.21.2): a whole
weight, one head and one expert, trained for four steps on `build_base`. It must go on loading: do not save it again.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from condft.tuner import load
from tests.helpers.models.tiny_models import logits
from tests.helpers.processes import ROOT

FOLDER = ROOT / "tests" / "helpers" / "stored" / "adapter_f5a3e70"
UNITS = [
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.q_proj.weight[h1]",
    "model.layers.0.mlp.experts.down_proj[2]",
]


def build_base() -> Any:
    """A tiny Mixtral whose weights are exact fractions, so that they do not depend on a random generator."""
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = (torch.arange(parameter.numel()) * 7919 % 1009 - 504).reshape(parameter.shape) / 1024
            parameter.copy_(values if parameter.ndim > 1 else torch.ones_like(parameter))
    return model


def through_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(build_base(), folder)


def through_condft(folder: Path) -> Any:
    return load(folder, build_base())


def through_transformers(folder: Path) -> Any:
    model = build_base()
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("way", [through_peft, through_condft, through_transformers])
def test_it_loads_and_computes_what_it_computed_then(way: Any) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    model = way(FOLDER)
    assert model.peft_config["default"].target_units == UNITS
    result = logits(model, expected["input_ids"])
    torch.testing.assert_close(result, expected["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(build_base(), expected["input_ids"]), result, atol=1e-3)


def test_merged_it_is_the_base_with_the_files_values() -> None:
    merged = through_peft(FOLDER).merge_and_unload().state_dict()
    values = load_file(FOLDER / "adapter_model.safetensors")
    expected = build_base().state_dict()
    prefix, layers = "base_model.model.model.layers", "model.layers"
    expected[f"{layers}.0.self_attn.k_proj.weight"] = values[f"{prefix}.0.self_attn.k_proj.condft_weight"]
    expected[f"{layers}.1.self_attn.q_proj.weight"][4:8] = values[f"{prefix}.1.self_attn.q_proj.condft_weight"]
    expected[f"{layers}.0.mlp.experts.down_proj"][2:3] = values[f"{prefix}.0.mlp.experts.condft_down_proj"]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_saved_again_its_files_hold_the_same(tmp_path: Path) -> None:
    through_peft(FOLDER).save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
