"""The recipe of tiny parts, and the real quickstart's settings."""

from pathlib import Path

import pytest

from scripts.bench.gpu.part import Place
from scripts.bench.gpu.quickstart import quickstart, real_config
from tests.helpers.processes import ROOT


def test_the_tiny_run_ends_with_finite_losses() -> None:
    found = quickstart(Place("cpu", small=True))
    assert found["problems"] == []
    assert (found["steps"], found["real_models"]) == (4, False)
    assert found["summary"]["frozen_unchanged"]


def test_the_real_one_is_the_quickstart_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = real_config(tmp_path)
    assert config.output_dir == str(tmp_path / "run")
    assert config.training.steps == 130
