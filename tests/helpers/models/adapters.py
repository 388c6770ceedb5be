"""Trained adapters of a tiny Llama: a training loop and fixtures (a pytest plugin, see tests/conftest.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama

EVERYTHING: dict[str, Any] = {
    "num_tensors": 5,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [33, 80]},
}
"""Options of an adapter that has all kinds of parts; for a tiny Llama whose embeddings are not tied."""


def train(model: nn.Module, ids: torch.Tensor, *, lr: float = 0.5, steps: int = 2) -> None:
    """Plain SGD on the model's own loss: every trainable parameter moves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama's trained adapter of five weights; to read, not to write to."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(build_tiny_llama(), CondFTConfig(num_tensors=5))
    train(model, torch.arange(8)[None])
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tiny_llama: Callable[..., nn.Module], token_ids: torch.Tensor) -> Callable[..., PeftModel]:
    """Makes a tiny Llama with an adapter trained for two steps; options go to `CondFTConfig`."""

    def build(*, base: nn.Module | None = None, lr: float = 0.5, steps: int = 2, **options: object) -> PeftModel:
        options = options or {"trainable_fraction": 0.4}
        model = get_peft_model(tiny_llama() if base is None else base, CondFTConfig(**options))
        train(model, token_ids, lr=lr, steps=steps)
        return model

    return build
