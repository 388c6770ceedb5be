"""A tiny real audio LLM that trains on features, its data and configurations (a pytest plugin)."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedConfig,
)

from condft.files.yaml import dump_yaml
from condft.retention.self_distillation import SelfDistillation, SelfDistillationConfig
from condft.tasks.speech.features import PassThroughTower
from condft.training import RunConfig, load_config
from condft.tuner import CondFTConfig

VOCABULARY, AUDIO_TOKEN, TOWER_DIM = 64, 63, 16


def build_audio_llm(
    seed: int = 0, text_config: PreTrainedConfig | None = None
) -> AudioFlamingo3ForConditionalGeneration:
    """With a Llama, or the language model of `text_config`."""
    config = AudioFlamingo3Config(
        audio_config=AudioFlamingo3EncoderConfig(
            num_mel_bins=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_size=TOWER_DIM,
            max_source_positions=8,
        ),
        text_config=text_config
        or LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
        ),
        audio_token_id=AUDIO_TOKEN,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AudioFlamingo3ForConditionalGeneration(config)


def build_trainee(dropout: float = 0.0) -> PeftModel:
    """The audio LLM ready to train: pass-through tower, LoRA in the language model, the projector beside it."""
    model = build_audio_llm()
    model.model.audio_tower = PassThroughTower()
    targets = r".*language_model.*\.(q_proj|up_proj)"
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, modules_to_save=["multi_modal_projector"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config)


def build_condft_trainee() -> PeftModel:
    """The same with CondFT: fp32 copies of some language-model weights, and the projector beside them."""
    model = build_audio_llm()
    model.model.audio_tower = PassThroughTower()
    layers = "model.language_model.layers"
    units = [f"{layers}.0.self_attn.v_proj.weight", f"{layers}.1.mlp.down_proj.weight"]
    config = CondFTConfig(target_units=units, modules_to_save=["multi_modal_projector"])
    return get_peft_model(model, config)


def build_examples(count: int = 11) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    examples = []
    for index in range(count):
        length, answer = 2 + index % 3, 1 + index % 4
        examples.append(
            {
                "features": torch.randn(length, TOWER_DIM, generator=generator),
                "answer": torch.randint(1, AUDIO_TOKEN, (answer,), generator=generator),
            }
        )
    return examples


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Left-padded: pads, a word of prompt, the audio's places, the answer."""
    rows = [[5, 6] + [AUDIO_TOKEN] * len(e["features"]) + e["answer"].tolist() for e in examples]
    width, frames = max(map(len, rows)), max(len(e["features"]) for e in examples)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
        "input_features": torch.zeros(len(rows), frames, TOWER_DIM),
        "input_features_mask": torch.zeros(len(rows), frames, dtype=torch.long),
    }
    for at, (row, example) in enumerate(zip(rows, examples, strict=True)):
        batch["input_ids"][at, width - len(row) :] = torch.tensor(row)
        batch["attention_mask"][at, width - len(row) :] = 1
        batch["labels"][at, width - len(example["answer"]) :] = example["answer"]
        batch["input_features"][at, : len(example["features"])] = example["features"]
        batch["input_features_mask"][at, : len(example["features"])] = 1
    return batch


def build_self_distillation(model: PeftModel, settings: SelfDistillationConfig) -> SelfDistillation:
    """On fixed random texts."""
    texts = torch.randint(1, AUDIO_TOKEN, (5, 8), generator=torch.Generator().manual_seed(3))
    return SelfDistillation(settings, texts, model.disable_adapter, seed=0)


def config_content(output_dir: str | Path, **training: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "model": {"language_model": "llm", "audio_tower": "tower"},
        "data": {"manifest": "manifest.jsonl"},
        "training": {
            "projector_steps": 3,
            "steps": 4,
            "per_device_batch_size": 4,
            "warmup_steps": 2,
            "mixed_precision": "no",
            "learning_rate": {"projector": 1e-2, "language_model": 1e-2},
            **training,
        },
    }


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(**training: Any) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(dump_yaml(config_content(tmp_path / "run", **training)))
        return load_config(path)

    return make


@pytest.fixture
def load_sections(tmp_path: Path, content: dict[str, Any]) -> Callable[..., RunConfig]:
    """Loads `content` with changed sections from a file `c.yaml`, with overrides."""

    def load(*overrides: str, **sections: Any) -> RunConfig:
        merged = copy.deepcopy(content)
        for name, value in sections.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "c.yaml"
        path.write_text(dump_yaml(merged))
        return load_config(path, overrides)

    return load


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    return config_content(tmp_path / "run")


@pytest.fixture
def audio_llm() -> Callable[..., AudioFlamingo3ForConditionalGeneration]:
    return build_audio_llm


@pytest.fixture
def trainee() -> Callable[..., PeftModel]:
    return build_trainee


@pytest.fixture
def condft_trainee() -> Callable[..., PeftModel]:
    return build_condft_trainee


@pytest.fixture
def data() -> tuple[list[Any], Callable[..., Any]]:
    return build_examples(), collate
