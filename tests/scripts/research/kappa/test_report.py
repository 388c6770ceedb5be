"""Tables of a planted atlas and planted changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.research.kappa.report import write_report
from tests.helpers.records.atlas_lines import atlas_lines, change_lines


def written(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def report(tmp_path: Path) -> list[str]:
    written(tmp_path / "atlas.jsonl", atlas_lines())
    written(tmp_path / "stability.jsonl", change_lines())
    tables, *figures = write_report(tmp_path)
    assert [figure.name for figure in figures] == ["deficit.png", "atlas_tiny.png", "stability.png"]
    return tables.read_text(encoding="utf-8").splitlines()


def test_types_have_a_row_each_and_the_embedding_is_apart(report: list[str]) -> None:
    row = next(line for line in report if line.startswith("| q_proj |"))
    assert row.startswith("| q_proj | 8 | 32 x 32 | 142 (100 to 201) | 90 |")
    assert row.endswith("| 1.00 | 1.00 |")  # κ with depth, κ with deficit
    assert "| tiny | embed.weight | 96 x 32 | 5 / 90 | 0.50 / 0.40 |" in report


def test_an_order_that_stays_or_is_reversed_is_seen(report: list[str]) -> None:
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in report if line.startswith(("| bf16", "| noise"))
    }
    assert [cell.strip() for cell in rows["bf16"][:3]] == ["0.002", "1.00", "1.00"]
    assert [cell.strip() for cell in rows["noise 0.1"][:3]] == ["0.1", "-1.00", "-1.00"]
