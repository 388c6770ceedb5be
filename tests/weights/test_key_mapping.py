"""Every parameter is found in the files as from_pretrained finds it, bit for bit, and errors name what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from condft import analyze
from condft.report import SkipReason
from condft.weights.safetensors_file import SINGLE_FILE, StoredTensor
from condft.weights.walk import iter_checkpoint_units
from tests.helpers.models.tiny_checkpoints import (
    MODELS,
    SMALL,
    assert_streams_as_loaded,
    build,
    edit_config,
    rewrite,
    split,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_names_values_roles_and_skips_are_the_loaded_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype)
    model.save_pretrained(tmp_path)
    assert_streams_as_loaded(tmp_path, type(model).from_pretrained(tmp_path, dtype="auto"))


def test_a_composed_vision_llm(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(**SMALL),
    )
    model = transformers.LlavaForConditionalGeneration(config).bfloat16().eval()
    model.save_pretrained(tmp_path)
    units = assert_streams_as_loaded(tmp_path, model)
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in units


def fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's file as it would be if the experts were stored the way the model holds them."""
    fused = {key: value for key, value in tensors.items() if ".experts." not in key}
    for layer in range(SMALL["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = (torch.stack([tensors[f"{old}.{i}.{w}.weight"] for i in range(3)]) for w in ("w1", "w2", "w3"))
        fused[f"{new}.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"{new}.down_proj"] = w2
    return fused


def test_experts_stored_fused_or_one_by_one_are_the_same_units(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    assert any(key.endswith("experts.2.w1.weight") for key in load_file(tmp_path / SINGLE_FILE))
    one_by_one = assert_streams_as_loaded(tmp_path, model)
    rewrite(tmp_path, fuse_experts)
    fused = assert_streams_as_loaded(tmp_path, model)
    assert "model.layers.1.mlp.experts.gate_up_proj[2]" in fused
    assert fused.keys() == one_by_one.keys()


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_is_read_without_the_others(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    if fused:
        rewrite(tmp_path, fuse_experts)
    unit = split(iter_checkpoint_units(tmp_path))[0]["model.layers.0.mlp.experts.gate_up_proj[1]"]
    read: list[int] = []
    original = StoredTensor._read

    def count(self: StoredTensor, shape: tuple[int, ...], offset: int) -> Tensor:
        values = original(self, shape, offset)
        read.append(values.numel())
        return values

    monkeypatch.setattr(StoredTensor, "_read", count)
    assert unit.load().tensor.shape == (48, 16)
    assert sum(read) == 48 * 16


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_head_models_config_over_the_base_models_keys(name: str, tmp_path: Path) -> None:
    """`model.` missing in the file, as if the base model had been saved."""
    model = build(name)
    model.save_pretrained(tmp_path)
    prefix = f"{model.base_model_prefix}."
    rewrite(tmp_path, lambda tensors: {key.removeprefix(prefix): value for key, value in tensors.items()})
    assert_streams_as_loaded(tmp_path, model)


def test_a_base_models_config_over_a_head_models_keys(tmp_path: Path) -> None:
    model = build("LlamaModel")
    model.save_pretrained(tmp_path)
    head = {"lm_head.weight": torch.ones(32, 16)}
    rewrite(tmp_path, lambda tensors: {f"model.{key}": value for key, value in tensors.items()} | head)
    assert_streams_as_loaded(tmp_path, model)


def head_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("model.embed_tokens", "lm_head"): value for key, value in tensors.items()}


def both_equal(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def both_different(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


@pytest.mark.parametrize(
    ("change", "tied"), [(dict, True), (head_only, True), (both_equal, True), (both_different, False)]
)
def test_tied_weights_come_once_however_they_are_stored(change: Any, tied: bool, tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    live = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    units = assert_streams_as_loaded(tmp_path, live)
    assert ("lm_head.weight" in units) is not tied


@pytest.mark.parametrize("named", ["bfloat16", None])
def test_the_dtype_is_that_of_dtype_auto(named: str | None, tmp_path: Path) -> None:
    """A config that names another dtype than the file's decides, as it does for from_pretrained."""
    build("LlamaForCausalLM", torch.float16).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=named)
    live = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert live.dtype == (torch.float16 if named is None else torch.bfloat16)
    assert_streams_as_loaded(tmp_path, live)


def test_a_weight_that_no_file_holds(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    lost = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {("stray" if key == lost else key): value for key, value in tensors.items()})
    with pytest.raises(ValueError, match=f"lack 1 of the weights .* the first is {lost}: .*'stray'.*random"):
        analyze(tmp_path)


def test_a_weight_of_another_shape_names_its_file(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "model.layers.0.mlp.up_proj.weight": torch.ones(25, 16)})
    with pytest.raises(ValueError, match=r"up_proj.*model.safetensors holds it as .25, 16., the model needs .24, 16."):
        analyze(tmp_path)


def test_experts_that_do_not_fit_together_name_their_file(tmp_path: Path) -> None:
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    odd = {"model.layers.0.block_sparse_moe.experts.1.w1.weight": torch.ones(25, 16)}
    rewrite(tmp_path, lambda tensors: tensors | odd)
    with pytest.raises(ValueError, match=r"model\.safetensors: the tensors of .*gate_up_proj cannot be converted"):
        analyze(tmp_path)


def test_parameters_stored_quantized_are_skipped_by_name(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    scale = {f"{name}_scale_inv": torch.ones(1, 1)}
    rewrite(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)} | scale)
    units, skipped = split(iter_checkpoint_units(tmp_path))
    (skip,) = [skip for skip in skipped if skip.reason is SkipReason.QUANTIZED]
    assert (skip.name, skip.detail) == (name, "fp8: stored as float8_e4m3fn in model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in units


def test_codes_under_other_names_are_skipped_by_name(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    rewrite(tmp_path, lambda tensors: {key.replace(name, name[:-6] + "qweight"): v for key, v in tensors.items()})
    _, skipped = split(iter_checkpoint_units(tmp_path))
    assert [s.detail for s in skipped if s.reason is SkipReason.QUANTIZED] == ["gptq: stored under other names"]
