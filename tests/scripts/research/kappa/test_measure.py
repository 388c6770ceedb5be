"""Both experiments end to end on tiny models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condft.training import read_metrics
from scripts.research.config import StudyConfig
from scripts.research.kappa.columns import load_atlases, load_changes
from scripts.research.kappa.measure import FINE_TUNING, Stability, fine_tune, finite, measure_atlas
from scripts.research.kappa.report import write_report
from scripts.research.kappa.variants import variants
from tests.helpers.models.tiny_speech import save_language_model


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    torch.set_num_threads(1)  # layers this small only wait for a second thread
    (tmp_path / "german.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund. " * 20)
    content: dict[str, Any] = {
        "results": "unused",
        "workspace": str(tmp_path / "workspace"),
        "language_model": save_language_model(tmp_path / "llama"),
        "text": {"file": str(tmp_path / "german.txt"), "window": 16, "test_windows": 6},
        "trainable_fraction": 0.2,
        "training": {"projector_steps": 0, "steps": 3, "per_device_batch_size": 2, "mixed_precision": "bf16"},
        "evaluation": {},
        "final_text_tokens": 16,
        "points": [3],
        "seeds": [0],
        "levels": [1.0],
        "arms": {},
    }
    return StudyConfig.model_validate(content)


def test_atlas_stability_and_report_end_to_end(config: StudyConfig, tmp_path: Path) -> None:
    folder, results = Path(config.language_model), tmp_path / "results"
    assert measure_atlas([folder], results / "atlas.jsonl") == 15
    assert measure_atlas([folder], results / "atlas.jsonl") == 0  # it is there

    path = results / "stability.jsonl"
    stability = Stability(folder, path)
    stability.measure_variants()
    assert all(torch.equal(stability.model.get_parameter(name), weight) for name, weight in stability.base.items())
    fine_tune(stability, config, [1e-2])
    count = len(variants()) + 1
    assert len(read_metrics(path)) == count
    again = Stability(folder, path)
    again.measure_variants()
    fine_tune(again, config, [1e-2])
    assert len(read_metrics(path)) == count

    (atlas,) = load_atlases(results / "atlas.jsonl")
    assert len(atlas.lines) == 14
    assert [line["role"] for line in atlas.others] == ["embedding"]
    low, deficit, high = map(atlas.column, ("deficit_at_least", "entropy_deficit", "deficit_at_most"))
    assert (low <= deficit).all()
    assert (deficit <= high).all()
    changes = {change.label: change for change in load_changes(path, atlas)}
    assert changes["noise 0.1"].moved == pytest.approx(0.1, rel=1e-2)
    assert 1e-4 < np.median(changes["fp16"].moved) < np.median(changes["bf16"].moved) < 3e-3
    tuned = changes[f"{FINE_TUNING} at 0.01"]
    assert (tuned.moved > 1e-2).all()
    assert tuned.line["test_loss"] < tuned.line["test_loss_before"]
    # the atlas reads the checkpoint, stability a live model: the same weights under the same names
    for place, line in enumerate(sorted(atlas.lines, key=lambda line: line["name"])):
        assert changes["bf16"].scores["κ"][0, place] == pytest.approx(line["condition_number"], rel=1e-5)

    paths = write_report(results)
    assert [item.name for item in paths] == ["kappa.md", "deficit.png", "atlas_llama.png", "stability.png"]
    assert all(item.stat().st_size > 1000 for item in paths)
    text = paths[0].read_text(encoding="utf-8")
    assert "14 of 14" in text
    assert "| noise 0.1 | 0.1 |" in text


def test_figures_are_rounded_to_digits_and_infinity_is_null() -> None:
    assert finite(1.23456789, 3) == 1.23
    assert finite(float("inf"), 3) is None
