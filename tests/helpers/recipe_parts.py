"""Fixtures: tiny real parts of a recipe, and a configuration that runs them. A conftest imports them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from condft.training import RunConfig, load_config
from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_manifest


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    manifest = write_manifest(folder / "speech", [0.3 + 0.05 * i for i in range(12)], num_test=4)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return {
        "audio_tower": save_whisper(folder / "whisper"),
        "language_model": save_language_model(folder / "llama"),
        "manifest": str(manifest),
        "text": str(folder / "text.txt"),
    }


@pytest.fixture
def configure(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, RunConfig]]:
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))

    def make(*overrides: str) -> tuple[Path, RunConfig]:
        content = {
            "output_dir": str(tmp_path / "run"),
            "model": {"audio_tower": parts["audio_tower"], "language_model": parts["language_model"]},
            "data": {"manifest": parts["manifest"]},
            "tuning": {"trainable_fraction": 0.3},
            "training": {
                "projector_steps": 2,
                "steps": 4,
                "per_device_batch_size": 4,
                "warmup_steps": 1,
                "checkpoint_every": 2,
                "learning_rate": {"projector": 1e-2, "language_model": 1e-2},
            },
            "evaluation": {
                "max_new_tokens": 4,
                "text": parts["text"],
                "text_tokens": 200,
                "context_length": 50,
                "sampled_sequences": 2,
                "sampled_tokens": 12,
            },
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path, load_config(path, overrides)

    return make
