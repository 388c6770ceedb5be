"""The order of the runs, their keys, the choice of a rate, and the results file."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.research.config import ArmSection, load_study
from scripts.research.store import append_line, claimed
from scripts.research.study.plan import RunSpec, best_of_sweep, count_runs, plan_runs, run_key, sweep_order
from scripts.research.study.report import arms_with_runs, write_report
from scripts.research.study.results import Results, best_rates
from tests.helpers.study_lines import STUDIES, append_run, line, study_of

ARMS = {
    "other": ArmSection(rates=[0.1]),
    "first": ArmSection(rates=[0.1, 0.2, 0.4], main=True),
    "second": ArmSection(rates=[1.0, 2.0], main=True),
}
COMMITTED = {
    "moe": 151,
    "moe_bases": 288,
    "moe_second": 95,
    "pilot_distillation": 6,
    "smallest": 3,
    "speech": 90,
    "text": 106,
}
"""Study -> runs in its results file that it would not do again; of the other lines, settings have changed since."""
rates = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6)
studies = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.builds(ArmSection, rates=rates, main=st.booleans()), max_size=4
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_length_of_answers_that_nobody_gives_changes_no_key(path: Path) -> None:
    """Studies on text transcribe nothing; their runs bear keys from when the default was 24."""
    study = load_study(path)
    limit = study.determining()["evaluation"]["max_new_tokens"]
    assert limit == (24 if study.text else study.evaluation.max_new_tokens)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_committed_run_is_due_again(path: Path) -> None:
    """Renaming a setting must not change the keys of runs that took days."""
    study = load_study(path)
    assert len(Results(study).runs) == COMMITTED[path.stem]


def test_the_main_question_comes_first() -> None:
    runs = plan_runs(ARMS, [0, 1, 2], {"first": [0.4, 0.1], "second": [1.0], "other": []}, [0])
    assert [(run.arm, run.rate, run.seed) for run in runs] == [
        ("first", 0.2, 0),
        ("second", 1.0, 0),
        ("first", 0.1, 0),
        ("first", 0.4, 0),
        ("second", 2.0, 0),
        ("first", 0.4, 1),
        ("first", 0.1, 1),
        ("second", 1.0, 1),
        ("first", 0.4, 2),
        ("first", 0.1, 2),
        ("second", 1.0, 2),
        ("other", 0.1, 0),
    ]


@given(studies, st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True))
def test_a_plan_with_all_rates_known_has_every_run_once(arms: dict[str, ArmSection], seeds: list[int]) -> None:
    chosen = {name: list(dict.fromkeys(arm.rates))[:2] for name, arm in arms.items()}
    for sweeping in (seeds[:1], seeds):
        runs = plan_runs(arms, seeds, chosen, sweeping)
        assert len(runs) == len(set(runs)) == count_runs(arms, seeds, chosen, sweeping)
        mains = [arms[run.arm].main for run in runs]
        assert mains == sorted(mains, reverse=True)


@given(rates)
def test_a_sweep_starts_in_the_middle_and_leaves_none_out(values: list[float]) -> None:
    order = sweep_order(values)
    assert sorted(order) == sorted(set(values))
    below = sum(rate < order[0] for rate in order)
    assert below in (len(order) - 1 - below, len(order) - 2 - below)


def test_a_key_tells_everything_that_determines_a_run() -> None:
    spec, study = RunSpec("first", 0.1, 0), {"training": {"steps": 3}}
    keys = {
        run_key(spec, study, "a"),
        run_key(RunSpec("second", 0.1, 0), study, "a"),
        run_key(RunSpec("first", 0.2, 0), study, "a"),
        run_key(RunSpec("first", 0.1, 1), study, "a"),
        run_key(spec, {"training": {"steps": 4}}, "a"),
        run_key(spec, study, "b"),
    }
    assert len(keys) == 6
    assert run_key(spec, study, "a") in keys


def test_the_best_rate_forgets_least_at_the_level() -> None:
    curves = {
        0.1: [(4.0, 0.0), (2.0, 0.01)],  # forgets least, but never gets there
        0.2: [(4.0, 0.0), (0.5, 0.2)],
        0.4: [(4.0, 0.0), (0.2, 0.9)],
        0.8: [],  # diverged
    }
    assert best_of_sweep(curves, 1.0) == 0.2
    assert best_of_sweep(curves, 0.1) == 0.4
    assert best_of_sweep({0.8: []}, 1.0) is None


def test_only_the_points_of_finished_attempts_of_this_study_count(tmp_path: Path) -> None:
    study, spec = study_of(tmp_path), RunSpec("lowest_within_type", 0.1, 0)
    append_line(study.results, line(study, "point", "cut off", spec, step=1, test_loss=9.0, kl_to_base=9.0))
    append_line(study.results, line(study, "point", "whole", spec, step=1, test_loss=1.0, kl_to_base=0.1))
    append_line(study.results, line(study, "run", "whole", spec, status="finished"))
    append_line(study.results, line(study, "run", "whole", RunSpec("no_more", 0.1, 0), status="finished"))
    another = study.model_copy(update={"trainable_fraction": 0.7})
    append_line(study.results, line(another, "run", "whole", spec, status="finished"))
    with Path(study.results).open("a") as file:
        file.write('{"torn')
    results = Results(study)
    (key,) = results.runs
    assert results.curve(key, "kl_to_base") == [(1.0, 0.1)]
    assert results.by_spec() == {spec: key}
    with pytest.raises(ValueError, match="JSON"):
        append_line(study.results, {"loss": float("nan")})


def test_another_self_distillation_is_another_run_in_the_arms_that_have_it_alone(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    plain, distilled = RunSpec("lowest_within_type", 0.1, 0), RunSpec("lowest_within_type_distilled", 0.1, 0)
    for spec in (plain, distilled):
        append_line(study.results, line(study, "run", "whole", spec, status="finished"))
    assert list(Results(study).by_spec()) == [plain, distilled]
    settings = study.training.self_distillation
    assert settings is not None
    heavier = study.training.model_copy(update={"self_distillation": settings.model_copy(update={"weight": 77.0})})
    assert list(Results(study.model_copy(update={"training": heavier})).by_spec()) == [plain]


@pytest.mark.parametrize(("model", "told"), [("one", False), ("bases/{seed}", True)])
def test_one_seed_alone_is_no_base_of_its_own(tmp_path: Path, model: str, told: bool) -> None:
    arms = {"first": ARMS["first"]}
    study = study_of(tmp_path, language_model=model, seeds=[0], arms=arms, levels=[2.0])
    append_run(study, RunSpec("first", 0.2, 0), [(4.0, 0.0), (1.0, 3.0)])
    tables, *_ = write_report(study, Results(study))
    assert ("the intervals are over bases" in tables.read_text()) is told


def test_an_override_is_a_setting_of_the_file(tmp_path: Path) -> None:
    path = next(path for path in STUDIES if path.stem == "moe_bases")
    changed = load_study(path, ["training.self_distillation.weight=4", "seeds=[3]"])
    assert changed.training.self_distillation is not None
    assert (changed.training.self_distillation.weight, changed.seeds) == (4.0, [3])
    with pytest.raises(ValueError, match=r"training.self_distillation.wieght"):
        load_study(path, ["training.self_distillation.wieght=4"])


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


def test_every_level_has_its_own_best_rate(tmp_path: Path) -> None:
    arms = {"first": ARMS["first"], "unfinished": ArmSection(rates=[0.1, 0.2])}
    study = study_of(tmp_path, arms=arms, seeds=[0, 1], levels=[2.0, 1.0, 1.9])
    for rate, loss, change in ((0.1, 1.8, 0.01), (0.2, 0.9, 0.2), (0.4, 0.5, 0.9)):
        append_run(study, RunSpec("first", rate, 0), [(4.0, 0.0), (loss, change)])
    append_run(study, RunSpec("unfinished", 0.2, 0), [(4.0, 0.0)])
    assert best_rates(study, Results(study)) == {"first": [0.1, 0.2], "unfinished": []}


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    with claimed(tmp_path, "k") as mine, claimed(tmp_path, "k") as again, claimed(tmp_path, "other") as other:
        assert (mine, again, other) == (True, False, True)
    with claimed(tmp_path, "k") as mine:
        assert mine


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_ship_are_valid(path: Path) -> None:
    from scripts.research.study.arms import ARMS as BUILDERS

    study = load_study(path)
    assert set(study.arms) <= set(BUILDERS)
    # the MoE reads four times the text at every point instead: its answers stand there, not at the end
    enough = {
        "smallest": 2_000,
        "moe": 16_000,
        "moe_second": 16_000,
        "moe_bases": 16_000,
        "pilot_distillation": 2_000,
    }.get(path.stem, 30_000)
    assert study.final_text_tokens >= enough
    moved = study.model_copy(update={"results": "elsewhere", "levels": [9.0], "seeds": [7]})
    assert moved.digest() == study.digest()
    longer = study.model_copy(update={"trainable_fraction": 0.5})
    assert longer.digest() != study.digest()


def test_a_slip_in_a_study_is_named(tmp_path: Path) -> None:
    content = STUDIES[0].read_text().replace("points: [", "points: [0, ")
    (tmp_path / "s.yaml").write_text(content + "\ntypo: 1\n")
    with pytest.raises(ValueError, match="typo"):
        load_study(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match="must rise from 1"):
        load_study(tmp_path / "s.yaml")
    with pytest.raises(FileNotFoundError, match="configs/study"):
        load_study(tmp_path / "none.yaml")
    assert json.dumps(load_study(STUDIES[0]).determining())


def test_the_texts_of_the_single_tensors_are_those_of_their_results() -> None:
    """task (b)'s own YAML has changed since; its texts would start the experiment anew."""
    study = load_study(STUDIES[0].parents[1] / "damage" / "german.yaml")
    assert (study.training.steps, study.text.test_windows, study.evaluation.text) == (60, 48, "pydoc")
    assert study.arms["full_fine_tuning"].rates == [2e-5, 6e-5, 2e-4]
