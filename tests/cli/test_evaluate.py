"""`condft evaluate` shows the figures and writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import invoke, refused


def test_figures_are_printed_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def evaluate_run(run_dir: Path, **options: Any) -> dict[str, Any]:
        asked.append({"run_dir": run_dir, **options})
        return {"wer": 0.25, "num_clips": 4}

    monkeypatch.setattr("condft.recipe.evaluate_run", evaluate_run)
    output = invoke("evaluate", tmp_path, "--manifest", "m.jsonl", "--split", "dev", "--json", tmp_path / "f.json")
    assert "wer │ 0.2500" in output
    assert "num_clips │ 4" in output
    assert json.loads((tmp_path / "f.json").read_text()) == {"wer": 0.25, "num_clips": 4}
    assert asked == [{"run_dir": tmp_path, "manifest": Path("m.jsonl"), "split": "dev", "skip_bad": False}]


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    assert "holds no finished run: config.yaml is missing" in refused("evaluate", tmp_path)
