"""The recipe on the device: the real quickstart if its models and data are present, else a run of tiny models."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from condft.recipe import run
from condft.training import RunConfig, load_config, read_metrics
from scripts.bench.gpu.part import Place, Result

__all__ = ["quickstart"]

CONFIG = Path("configs/quickstart.yaml")


def quickstart(place: Place) -> Result:
    """One run of `configs/quickstart.yaml`; every loss must be finite, and every frozen tensor unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder)) if place.small or not _parts_are_present() else real_config(Path(folder))
        began = time.perf_counter()
        run(config)
        seconds = time.perf_counter() - began
        output = Path(config.output_dir)
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        losses = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    problems = [] if losses and all(map(math.isfinite, losses)) else [f"losses: {losses}"]
    if not summary["frozen_unchanged"]:
        problems.append("frozen tensors changed")
    return {
        "real_models": config.model.language_model.startswith("models/"),
        "seconds": seconds,
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "summary": summary,
        "problems": problems,
    }


def _parts_are_present() -> bool:
    paths = ("models/smollm2-135m-instruct", "models/whisper-tiny.en", "data/digits/manifest.jsonl")
    return all(Path(path).exists() for path in paths)


def real_config(folder: Path) -> RunConfig:
    """The quickstart as it ships, with its output elsewhere."""
    return load_config(CONFIG, [f"output_dir={folder / 'run'}"])


def tiny_config(folder: Path) -> RunConfig:
    """Both models built from configs, clips of chirps: seconds of work, and no network."""
    # The tests' own builder: the checkout is there, since the tests marked gpu run too.
    from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_manifest

    content: dict[str, Any] = {
        "seed": 0,
        "output_dir": str(folder / "run"),
        "model": {
            "language_model": save_language_model(folder / "llama"),
            "audio_tower": save_whisper(folder / "whisper"),
        },
        "data": {"manifest": str(write_manifest(folder / "speech", [0.3 + 0.05 * i for i in range(6)], num_test=2))},
        "tuning": {"trainable_fraction": 0.3, "stratify": None},
        "training": {"projector_steps": 1, "steps": 3, "per_device_batch_size": 2, "warmup_steps": 1},
        "evaluation": {"max_new_tokens": 2, "text_tokens": 60, "context_length": 30}
        | {"sampled_sequences": 2, "sampled_tokens": 8},
    }
    return RunConfig.model_validate(content)
