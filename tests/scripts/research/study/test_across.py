"""Ratios over many levels, from a results file."""

from pathlib import Path

import pytest

from scripts.research.config import ArmSection
from scripts.research.study.plan import RunSpec
from scripts.research.study.report import write_report
from scripts.research.study.results import Results
from tests.helpers.records.study_lines import append_run, study_of

ARMS = {
    "lowest_within_type": ArmSection(rates=[0.1, 0.2], main=True),
    "lowest_within_type_distilled": ArmSection(rates=[0.1]),
    "random_within_type": ArmSection(rates=[0.1], main=True),
    "osf": ArmSection(rates=[0.1]),
}


def test_a_rate_that_stops_just_short_decides_one_level_and_not_all(tmp_path: Path) -> None:
    """Low κ's slow rate ends at 1.12: below it its fast rate counts, which forgets ten times as much."""
    study = study_of(tmp_path, arms=ARMS, seeds=[0, 1], levels=[2.0, 1.0])
    for seed in study.seeds:
        append_run(study, RunSpec("lowest_within_type", 0.1, seed), [(4.0, 0.0), (1.12, 2.88)])
        append_run(study, RunSpec("lowest_within_type", 0.2, seed), [(4.0, 0.0), (1.0, 30.0)])
        append_run(study, RunSpec("lowest_within_type_distilled", 0.1, seed), [(4.0, 0.0), (1.0, 0.3)])
        append_run(study, RunSpec("random_within_type", 0.1, seed), [(4.0, 0.0), (1.0, 6.0)])
    append_run(study, RunSpec("osf", 0.1, 0), [(4.0, 0.0), (3.0, 1.0)])  # never gets there
    tables, *figures = write_report(study, Results(study))
    text = tables.read_text()
    assert "| random_within_type | 5.00 [5.00, 5.00], n = 2" in text  # at 1.0 alone
    across = text[text.index("## Across 21 levels, from test loss 2 to 1") :]
    # half of random's on 18 of the 21 levels, five times it on the 3 past 1.12
    expected = 0.5 ** (18 / 21) * 5 ** (3 / 21)
    value, spread = f"{expected:.2f}", "(0.50 to 5.00), 21, n = 2"
    assert f"| random_within_type | {value} [{value}, {value}] {spread} | 0.05" in across
    assert f"| lowest_within_type | {0.1 / (expected / 0.5):.2f} [" in across  # with over without
    assert "| osf |" not in across
    assert "| lowest_within_type over | seed 0 | seed 1 |" in across
    assert f"| random_within_type | {value} | {value} |" in across  # on each seed for itself
    assert tmp_path / "results_across.png" in figures
    assert (tmp_path / "results_across.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("levels", [[2.0], [2.0, 1.0]])
def test_where_nothing_can_be_read_across_the_report_says_so(tmp_path: Path, levels: list[float]) -> None:
    study = study_of(tmp_path, arms=ARMS, seeds=[0], levels=levels)
    append_run(study, RunSpec("osf", 0.1, 0), [(4.0, 0.0), (3.0, 1.0)])
    tables, *figures = write_report(study, Results(study))
    assert ("None: no two arms" in tables.read_text()) is (len(levels) > 1)
    assert not any("across" in figure.name for figure in figures)
