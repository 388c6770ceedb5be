"""A streamed checkpoint gives the units of the loaded model, bit for bit, and tells what is wrong with its files."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3VLMoeConfig,
    T5Config,
    Wav2Vec2Config,
    WhisperConfig,
)

from condft import analyze
from condft.report import SkippedWeight, SkipReason
from condft.shards import SINGLE_FILE, StoredTensor
from condft.units import Unit, load_ahead
from condft.weights import iter_checkpoint_units, iter_units

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
WHISPER = WhisperConfig(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    vocab_size=50,
    max_source_positions=20,
    max_target_positions=20,
    num_mel_bins=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
WAV2VEC2 = Wav2Vec2Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(8, 8),
    conv_stride=(2, 2),
    conv_kernel=(3, 3),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    vocab_size=12,
)
QWEN3_VL_MOE = Qwen3VLMoeConfig(
    text_config={
        **SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    vision_config={
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
)
# What each brings: prefixes, ties, Conv1D, experts stored one by one, transposed stacks, fp32 exceptions, parametrised
# weights computed from their parts.
MODELS = {
    "LlamaForCausalLM": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "LlamaModel": LlamaConfig(**SMALL),
    "GPT2LMHeadModel": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16),
    "WhisperForConditionalGeneration": WHISPER,
    "MixtralForCausalLM": MixtralConfig(**SMALL, num_local_experts=3),
    "Qwen3VLMoeForConditionalGeneration": QWEN3_VL_MOE,
    "T5ForConditionalGeneration": T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40),
    "Wav2Vec2Model": WAV2VEC2,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(MODELS[name]).to(dtype).eval()


def split(items: Iterator[Unit | SkippedWeight]) -> tuple[dict[str, Unit], list[SkippedWeight]]:
    units: dict[str, Unit] = {}
    skipped: list[SkippedWeight] = []
    for item in items:
        if isinstance(item, Unit):
            units[item.name] = item
        else:
            skipped.append(item)
    return units, sorted(skipped, key=lambda skip: skip.name)


def assert_streams_as_loaded(folder: Path, live: nn.Module) -> dict[str, Unit]:
    """Every unit of the folder equals the live model's in all that a row is made of. Returns the streamed ones."""
    expected, expected_skips = split(iter_units(live))
    streamed, skips = split(iter_checkpoint_units(folder))
    assert streamed.keys() == expected.keys()
    assert skips == expected_skips
    for unit in load_ahead(streamed.values()):
        other = expected[unit.name]
        assert (unit.module_type, unit.role, unit.tensor.dtype) == (other.module_type, other.role, other.tensor.dtype)
        assert unit.matrix.shape == streamed[unit.name].matrix.shape == other.matrix.shape
        assert torch.equal(unit.tensor, other.tensor), unit.name
    return streamed


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / SINGLE_FILE))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_names_values_roles_and_skips_are_the_loaded_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype)
    model.save_pretrained(tmp_path)
    assert_streams_as_loaded(tmp_path, type(model).from_pretrained(tmp_path, dtype="auto"))


def test_a_composed_audio_llm(tmp_path: Path) -> None:
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


def test_the_report_of_a_sharded_folder_is_the_live_models_row_for_row(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    live, stored = analyze(model, progress=False), analyze(tmp_path, progress=False)
    assert stored.rows == live.rows
    assert stored.skipped == live.skipped
    assert stored.fingerprint == live.fingerprint


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


def test_a_folder_without_config_and_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        analyze(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder, and no hub id either"):
        analyze(tmp_path / "not" / "there")
    with pytest.raises(FileNotFoundError, match="as a hub id it cannot be had"):
        analyze("nobody/nothing")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["NoSuchModel"])
    with pytest.raises(ValueError, match="NoSuchModel"):
        analyze(tmp_path)


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_a_hub_id_in_the_cache(shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    model = build("LlamaForCausalLM")
    model.save_pretrained(repository / "snapshots" / revision, max_shard_size=shard_size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    report = analyze("someone/tiny", progress=False)
    assert report.rows == analyze(model, progress=False).rows
    assert report.model == "someone/tiny"


CUSTOM_CODE = """
import torch
from transformers import PreTrainedModel, PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-its-own"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.steps = [x.item() for x in torch.linspace(0, 1, 3)]
        self.only = torch.nn.Linear(3, 2)
        self.post_init()
"""


def test_a_checkpoints_own_code_runs_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    (tmp_path / "tiny.py").write_text(CUSTOM_CODE)
    config = {
        "model_type": "tiny-of-its-own",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.TinyModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = torch.randn(2, 3)
    save_file({"only.weight": weight, "only.bias": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        analyze(tmp_path)
    units, _ = split(iter_checkpoint_units(tmp_path, trust_remote_code=True))
    assert torch.equal(units["only.weight"].load().tensor, weight)


def on_meta(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_a_live_model_on_meta_is_read_from_the_folder_it_names(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    assert analyze(on_meta(tmp_path), progress=False).rows == analyze(model, progress=False).rows
    halved = analyze(on_meta(tmp_path, torch.bfloat16), progress=False)
    assert halved.rows == analyze(model.bfloat16(), progress=False).rows  # the live model's dtype, not the file's


def test_a_wrapped_model_on_meta_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    wrapped = get_peft_model(on_meta(tmp_path), LoraConfig(target_modules=["q_proj"]))
    assert analyze(wrapped, progress=False).rows == analyze(model, progress=False).rows
    assert analyze(torch.compile(on_meta(tmp_path)), progress=False).rows == analyze(model, progress=False).rows


def test_a_rank_that_holds_only_meta_tensors_selects_the_same(tmp_path: Path) -> None:
    from peft import get_peft_model

    from condft import CondFTConfig

    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    here = get_peft_model(model, CondFTConfig(num_tensors=3))
    there = get_peft_model(on_meta(tmp_path), CondFTConfig(num_tensors=3))
    assert there.peft_config["default"].target_units == here.peft_config["default"].target_units
    assert all(parameter.is_meta for parameter in there.parameters())


def test_only_the_meta_part_is_read(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    half = on_meta(tmp_path)
    changed = torch.randn(16, 16)
    half.model.layers[0].self_attn.q_proj.weight = nn.Parameter(changed)
    units, _ = split(iter_units(half))
    assert units["model.layers.0.self_attn.q_proj.weight"].deferred is None
    assert torch.equal(units["model.layers.0.self_attn.q_proj.weight"].tensor, changed)
    other = units["model.layers.1.self_attn.q_proj.weight"].load().tensor
    assert torch.equal(other, model.model.layers[1].self_attn.q_proj.weight)


def test_meta_weights_without_a_checkpoint_say_so(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    _, skipped = split(iter_units(on_meta(tmp_path, vocab_size=40)))
    details = {skip.name: skip.detail for skip in skipped if skip.reason is SkipReason.META_DEVICE}
    assert details.keys() == {"model.embed_tokens.weight"}
    assert "holds it as (32, 16), the model needs (40, 16)" in details["model.embed_tokens.weight"]
    (tmp_path / SINGLE_FILE).unlink()
    _, skipped = split(iter_units(on_meta(tmp_path)))
    details = {skip.name: skip.detail for skip in skipped if skip.reason is SkipReason.META_DEVICE}
    assert "has neither model.safetensors" in details["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"nothing to analyze in LlamaForCausalLM: .* meta_device"):
        analyze(on_meta(tmp_path))


def test_parameters_stored_quantised_are_skipped_by_name(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    scale = {f"{name}_scale_inv": torch.ones(1, 1)}
    rewrite(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)} | scale)
    units, skipped = split(iter_checkpoint_units(tmp_path))
    (skip,) = [skip for skip in skipped if skip.reason is SkipReason.QUANTISED]
    assert (skip.name, skip.detail) == (name, "fp8: stored as float8_e4m3fn in model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in units


def test_codes_under_other_names_are_skipped_by_name(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    rewrite(tmp_path, lambda tensors: {key.replace(name, name[:-6] + "qweight"): v for key, v in tensors.items()})
    _, skipped = split(iter_checkpoint_units(tmp_path))
    assert [s.detail for s in skipped if s.reason is SkipReason.QUANTISED] == ["gptq: stored under other names"]


def peak_memory() -> int:
    """Highest resident memory since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def save_zeros(shapes: dict[str, torch.Size], file: Path) -> None:
    """A safetensors file of fp32 zeros that takes no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * shape.numel()]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak")
def test_two_weights_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 48 * 2**20  # malloc gives back at once only what is larger than 32 MiB
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 4, "intermediate_size": size // 64})
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    save_zeros({name: value.shape for name, value in model.state_dict().items()}, tmp_path / SINGLE_FILE)
    units, _ = split(iter_checkpoint_units(tmp_path))
    assert sum(unit.tensor.nbytes == size for unit in units.values()) == 12
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    for unit in load_ahead(units.values()):
        assert unit.tensor.sum() == 0
    assert peak_memory() - before < 2.5 * size
