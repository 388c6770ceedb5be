"""The model of a run: composed of its pre-trained parts, described before training, and loaded with its adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from condft.tasks.speech import compose_audio_llm
from condft.tasks.speech.compose import encoder_window
from condft.training import RunConfig, checksum_tensors, frozen_tensors

__all__ = ["BaseFacts", "compose", "load_adapted", "window_of"]


@dataclass(frozen=True)
class BaseFacts:
    """Facts of the base model from before anything trains.

    Attributes:
        checksums: SHA-256 of every tensor by name; compared after training.
        num_parameters: Numbers in all parameters.
    """

    checksums: dict[str, str]
    num_parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> "BaseFacts":
        """The facts of a composed model that no adapter wraps yet."""
        count = sum(parameter.numel() for parameter in model.parameters())
        return cls(checksum_tensors(frozen_tensors(model)), count)


def window_of(config: RunConfig) -> int:
    """Longest clip that the run's encoder takes, in seconds.

    Raises:
        FileNotFoundError: The encoder is neither a local folder nor a checkpoint that the hub has.
    """
    _check_checkpoint("model.audio_tower", config.model.audio_tower, config.model.trust_remote_code)
    return encoder_window(config.model.audio_tower)


def compose(config: RunConfig, *, max_seconds: float) -> tuple[nn.Module, Any]:
    """The audio LLM and its processor, with the configured parts, dtype and projector seed.

    Args:
        config: The run.
        max_seconds: Length of the longest clip; it sets the encoder's window.

    Raises:
        FileNotFoundError: A part is neither a local folder nor a checkpoint that the hub has.
        ValueError: The parts do not fit together.
    """
    for key in ("audio_tower", "language_model"):
        _check_checkpoint(f"model.{key}", getattr(config.model, key), config.model.trust_remote_code)
    return compose_audio_llm(
        config.model.audio_tower,
        config.model.language_model,
        max_seconds=max_seconds,
        seed=config.seed,
        dtype=getattr(torch, config.model.dtype),
        trust_remote_code=config.model.trust_remote_code,
    )


def load_adapted(config: RunConfig, processor: Any, adapter: Path, *, is_trainable: bool = False) -> PeftModel:
    """The base composed anew, with a saved adapter on it, whole in every process.

    Args:
        config: The run that the adapter is of.
        processor: Saved with the adapter. It knows the run's window, which a clip may have set that was skipped later.
        adapter: The adapter's folder.
        is_trainable: Whether the adapter's parameters get `requires_grad`.

    Raises:
        ValueError: The adapter does not fit the composed model.
    """
    model, _ = compose(config, max_seconds=processor.feature_extractor.chunk_length)
    return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)


def _check_checkpoint(key: str, name: str, trust_remote_code: bool) -> None:
    """Names the setting. Without a network, transformers' error says only that the hub did not answer."""
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"{key}={name!r} is neither a checkpoint folder nor a checkpoint that the hub could provide. "
            "python -m scripts.data.get_models puts the quickstart's two checkpoints into models/."
        ) from error
