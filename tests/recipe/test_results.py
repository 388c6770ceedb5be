"""The files of a run's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from condft.recipe.results import ADAPTER, CONFIG, write_analysis, write_results
from condft.report import SpectralReport
from condft.training import load_config
from condft.training.output_dir import METRICS, RUN_CONTENT
from tests.helpers.records.reports import make_row


def test_all_files_come_back_and_are_known_as_a_runs(configure: Callable[..., Any], tmp_path: Path) -> None:
    _, config = configure()
    report = SpectralReport((make_row("layers.0.q.weight"), make_row("layers.1.q.weight", 7.0)))
    write_analysis(tmp_path / "run", config, report, ["layers.0.q.weight"])
    line = {"stage": "adapt", "loss": 1.0, "grad_norm": 1.0, "learning_rate": {"projector": 1e-3}}
    (tmp_path / "run" / METRICS).write_text(json.dumps(line) + "\n")
    write_results(tmp_path / "run", {"wer_after": 0.5})
    assert load_config(tmp_path / "run" / CONFIG) == config
    assert SpectralReport.load(tmp_path / "run" / "spectral_report.json") == report
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"wer_after": 0.5}
    # What `remove_run` deletes, and what refuses a second run, is all that a run writes.
    assert {path.name for path in (tmp_path / "run").iterdir()} | {ADAPTER} <= set(RUN_CONTENT)
