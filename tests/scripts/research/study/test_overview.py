"""The README's picture and table say what the committed results say."""

import re
from pathlib import Path

import pytest

from scripts.research.config import load_study
from scripts.research.study.across import forgotten
from scripts.research.study.levels import Across, ratio_across
from scripts.research.study.overview import METHODS, STUDIES, draw_overview, ratios_to_control
from scripts.research.study.results import Results
from tests.helpers.processes import ROOT

RECIPE = "lowest_within_type_distilled"
ROWS = ("lora_all_linear", "full_fine_tuning", "random_within_type", "lowest_within_type")  # of the README's table
CELL = re.compile(r"(\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\]")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if CELL.search(line)]
    shown = [CELL.findall(line) for line in lines]
    for column, path in enumerate(STUDIES):
        config = load_study(path)
        arms = forgotten(config, Results(config), config.best_by)
        ratios = [ratio_across(arms[RECIPE], arms[name]) for name in ROWS]
        assert [row[column] for row in shown] == [tuple(f"{x:.2f}" for x in (r.value, r.low, r.high)) for r in ratios]


def test_the_picture_is_of_every_method_and_task() -> None:
    ratios = ratios_to_control()
    assert list(ratios) == list(STUDIES.values())
    assert all(list(task) == list(METHODS) for task in ratios.values())
    assert all(task["lora_all_linear"].value == pytest.approx(1.0) for task in ratios.values())


def test_the_same_ratios_are_the_same_bytes(tmp_path: Path) -> None:
    ratios = {"a task": dict.fromkeys(METHODS, Across(0.5, 0.4, 0.6, 0.3, 0.7, 21, (5, 5)))}
    for name in ("one.svg", "two.svg"):
        draw_overview(ratios, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in drawn
