"""Tables and figures of planted points."""

from pathlib import Path

import pytest

from scripts.research.pretraining.report import write_report
from tests.helpers.records.pretraining_points import planted_points


def test_tables_and_figures_come_from_the_points(tmp_path: Path) -> None:
    points = planted_points()
    tables, *figures = write_report(points, tmp_path / "run.jsonl")
    text = tables.read_text()
    assert "Seed 0, commit 0123456789ab; 900 tokens in 9 steps" in text
    assert "(experts.down_proj 20, q_proj 20)" in text
    assert "| 3 | 1.00 [1.00, 1.00] |" in text
    assert "explain 0.03" in text
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="train first"):
        write_report(points[:1], tmp_path / "run.jsonl")
