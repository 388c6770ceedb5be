"""Tiny real models of many architectures, saved as checkpoints, and the comparison of streamed with loaded units."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

from condft.report import SkippedWeight
from condft.weights.safetensors_file import SINGLE_FILE
from condft.weights.unit import Unit, load_ahead
from condft.weights.walk import iter_checkpoint_units, iter_units

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
# What each brings: prefixes, ties, Conv1D, experts stored one by one, transposed stacks, fp32 exceptions, parametrized
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
