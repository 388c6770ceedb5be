"""Which modules FSDP2 shards as one group. Training on two processes: see tests/integration/test_engines.py."""

from typing import Any

import torch
from accelerate import Accelerator

from condft.training.engines.fsdp2 import FSDP2Engine, layer_classes


def test_the_groups_are_the_layers_of_tower_and_language_model(audio_llm: Any, trainee: Any) -> None:
    tower = ["AudioFlamingo3Attention", "AudioFlamingo3EncoderLayer"]
    assert layer_classes(audio_llm()) == [*tower, "LlamaDecoderLayer"]
    assert layer_classes(trainee()) == ["LlamaDecoderLayer"]  # wrapped by PEFT, and without the tower


def test_a_model_without_such_layers_is_one_group() -> None:
    assert layer_classes(torch.nn.Linear(2, 2)) == []


def test_flags_stay_and_the_model_is_left_in_shards() -> None:
    engine = FSDP2Engine(Accelerator(cpu=True))
    assert not engine.toggles_requires_grad
    assert not engine.leaves_model_whole
