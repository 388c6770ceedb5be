"""The tiny parts of tests/helpers/models/tiny_speech.py as fixtures."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

from condft.tasks.speech import Clip, compose_audio_llm, load_manifest
from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_clip, write_manifest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_clip() -> Callable[..., Path]:
    """`write_clip`; importlib's import mode lets tests reach a conftest through fixtures alone."""
    return write_clip


@pytest.fixture
def make_language_model() -> Callable[..., str]:
    """`save_language_model`."""
    return save_language_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a tiny Whisper and a tiny tied Llama."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return save_whisper(folder / "whisper"), save_language_model(folder / "llama")


@pytest.fixture(scope="session")
def speech_llm(
    checkpoints: tuple[str, str],
) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    """The tiny composition with a window of 2 s. Shared: tests must not change it."""
    return compose_audio_llm(*checkpoints, max_seconds=1.5)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("speech"), [0.4, 1.5, 0.9, 0.66])


@pytest.fixture(scope="session")
def clips(manifest: Path) -> list[Clip]:
    """Four clips of 0.4, 1.5, 0.9 and 0.66 s."""
    return load_manifest(manifest, max_seconds=2).clips
