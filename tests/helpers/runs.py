"""What the tests read of a finished run."""

import json
from pathlib import Path
from typing import Any

import torch

from condft.tasks.speech import SpeechCollator, compute_features, load_manifest, make_examples, precomputed_features
from condft.training import RunConfig


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def answer_logits(model: Any, processor: Any, config: RunConfig) -> torch.Tensor:
    """Logits of a training batch, through the stored features of the model's own tower."""
    clips = load_manifest(config.data.manifest or "", split="test").clips
    batch = SpeechCollator(processor)(make_examples(clips, compute_features(model, processor, clips)))
    with precomputed_features(model), torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits
