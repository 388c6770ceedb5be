"""A study's report: what was run, and what it says of arms that gain instead of forgetting."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from scripts.research.config import ArmSection
from scripts.research.study.plan import RunSpec
from scripts.research.study.report import arms_with_runs, write_report
from scripts.research.study.results import Results
from tests.helpers.records.study_lines import append_run, study_of

ARMS = {"first": ArmSection(rates=[0.1, 0.2, 0.4], main=True)}
FORGETTING = {"lowest_within_type": 1.0, "random_within_type": 2.0, "full_fine_tuning": 4.0}


def report_of(tmp_path: Path, forgetting: dict[str, float]) -> tuple[str, set[str]]:
    """The tables, and the names of the figures; a warning on the way is an error."""
    arms: dict[str, Any] = {name: ArmSection(rates=[0.1], main=True) for name in forgetting}
    study = study_of(tmp_path, arms=arms, seeds=[0, 1], levels=[1.0])
    for name, value in forgetting.items():
        for seed in study.seeds:
            append_run(study, RunSpec(name, 0.1, seed), [(4.0, 0.0), (1.0, value)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables, *figures = write_report(study, Results(study))
    return tables.read_text(), {figure.name for figure in figures}


def test_where_every_arm_gains_there_is_a_sentence_and_no_picture(tmp_path: Path) -> None:
    tables, figures = report_of(tmp_path, {name: -value for name, value in FORGETTING.items()})
    assert tables.count("None: no control's mean is above 0 there.") == 2  # by either measure
    assert "| control |" not in tables
    assert "results_ratios_1.png" not in figures


def test_a_single_control_that_gains_is_named_as_one(tmp_path: Path) -> None:
    tables, figures = report_of(tmp_path, {**FORGETTING, "random_within_type": -2.0})
    assert tables.count("| random_within_type | none (control ≤ 0), n = 2 |") == 2
    assert tables.count("| full_fine_tuning | 0.25 [0.25, 0.25], n = 2 |") == 2
    assert "results_ratios_1.png" in figures


def test_rates_beyond_those_that_are_due_are_listed_and_leave_nothing_less_to_run(tmp_path: Path) -> None:
    """On other seeds the first seed's best rate is due (0.1); a run at another one (0.2) replaces none."""
    arms = {"lowest_within_type": ArmSection(rates=[0.1, 0.2], main=True)}
    study = study_of(tmp_path, arms=arms, seeds=[0, 1, 2], levels=[1.0])
    for seed, rate, value in [(0, 0.1, 1.0), (0, 0.2, 2.0), (1, 0.1, 1.0), (1, 0.2, 0.5)]:
        append_run(study, RunSpec("lowest_within_type", rate, seed), [(4.0, 0.0), (1.0, value)])
    tables = write_report(study, Results(study))[0].read_text()
    assert "| lowest_within_type | 0.1, 0.2 | 1 at 0.1; 1 at 0.2 | 1 |" in tables


@pytest.mark.parametrize(("model", "over_bases"), [("one", False), ("bases/{seed}", True)])
def test_one_seed_alone_is_no_base_of_its_own(tmp_path: Path, model: str, over_bases: bool) -> None:
    arms = {"first": ARMS["first"]}
    study = study_of(tmp_path, language_model=model, seeds=[0], arms=arms, levels=[2.0])
    append_run(study, RunSpec("first", 0.2, 0), [(4.0, 0.0), (1.0, 3.0)])
    tables, *_ = write_report(study, Results(study))
    assert ("the intervals are over bases" in tables.read_text()) is over_bases


def test_seeds_with_bases_of_their_own_sweep_for_themselves(tmp_path: Path) -> None:
    arms = {"first": ARMS["first"]}
    study = study_of(tmp_path, language_model="bases/{seed}", seeds=[3, 4], arms=arms, levels=[2.0])
    assert [study.of("first", seed).language_model for seed in study.sweep_seeds] == ["bases/3", "bases/4"]
    for seed, changes in ((3, [0.2, 0.1, 0.3]), (4, [0.2, 0.3, 0.1])):
        for rate, change in zip(ARMS["first"].rates, changes, strict=True):
            append_run(study, RunSpec("first", rate, seed), [(4.0, 0.0), (1.0, change)])
    results = Results(study)
    (arm,) = arms_with_runs(study, results, 2.0)
    assert (arm.rates, arm.sweep, arm.shown_rates) == ((0.2, 0.4), (6, 6), "0.2 to 0.4")
    assert {seed: results.runs[key]["rate"] for seed, key in arm.keys.items()} == {3: 0.2, 4: 0.4}
