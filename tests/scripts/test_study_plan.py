"""The order of the runs, their keys, the choice of a rate, and the results file."""

import json
from pathlib import Path
from typing import Any

import pytest
from _study_config import ArmSection, load_study
from _study_plan import RunSpec, best_of_sweep, count_runs, plan_runs, run_key, sweep_order
from _study_store import Results, append_line, best_rates, claimed
from hypothesis import given
from hypothesis import strategies as st

ARMS = {
    "other": ArmSection(rates=[0.1]),
    "first": ArmSection(rates=[0.1, 0.2, 0.4], main=True),
    "second": ArmSection(rates=[1.0, 2.0], main=True),
}
STUDIES = sorted((Path(__file__).parents[2] / "configs" / "study").glob("*.yaml"))
rates = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6)
studies = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.builds(ArmSection, rates=rates, main=st.booleans()), max_size=4
)


def test_the_main_question_comes_first() -> None:
    runs = plan_runs(ARMS, [0, 1, 2], {"first": [0.4, 0.1], "second": [1.0], "other": []})
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
    runs = plan_runs(arms, seeds, chosen)
    assert len(runs) == len(set(runs)) == count_runs(arms, seeds, chosen)
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


def line(kind: str, attempt: str, **content: Any) -> dict[str, Any]:
    spec = {"arm": "first", "rate": 0.1, "seed": 0}
    return {"kind": kind, "key": "k", "attempt": attempt, "study": "s", **spec, **content}


def test_only_the_points_of_finished_attempts_of_this_study_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_line(path, line("point", "cut off", step=1, test_loss=9.0, kl_to_base=9.0))
    append_line(path, line("point", "whole", step=1, test_loss=1.0, kl_to_base=0.1))
    append_line(path, line("run", "whole", status="finished"))
    append_line(path, {**line("run", "whole", status="finished"), "key": "k2", "study": "another"})
    with path.open("a") as file:
        file.write('{"torn')
    results = Results(path, "s")
    assert list(results.runs) == ["k"]
    assert results.curve("k", "kl_to_base") == [(1.0, 0.1)]
    assert results.by_spec() == {RunSpec("first", 0.1, 0): "k"}
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"loss": float("nan")})


def test_every_level_has_its_own_best_rate(tmp_path: Path) -> None:
    study = load_study(STUDIES[0])
    arms = {"first": ARMS["first"], "unfinished": ArmSection(rates=[0.1, 0.2])}
    study = study.model_copy(update={"arms": arms, "seeds": [0, 1], "levels": [2.0, 1.0, 1.9]})
    path, digest = tmp_path / "results.jsonl", study.digest()
    for rate, loss, change in ((0.1, 1.8, 0.01), (0.2, 0.9, 0.2), (0.4, 0.5, 0.9)):
        spec = {"arm": "first", "rate": rate, "key": str(rate), "attempt": "a", "study": digest, "seed": 0}
        append_line(path, {"kind": "point", "test_loss": 4.0, "text_ce_change": 0.0, **spec})
        append_line(path, {"kind": "point", "test_loss": loss, "text_ce_change": change, **spec})
        append_line(path, {"kind": "run", "status": "finished", **spec})
    append_line(path, {"kind": "run", "status": "finished", **spec, "arm": "unfinished", "rate": 0.2, "key": "u"})
    assert best_rates(study, Results(path, digest)) == {"first": [0.1, 0.2], "unfinished": []}


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    with claimed(tmp_path, "k") as mine, claimed(tmp_path, "k") as again, claimed(tmp_path, "other") as other:
        assert (mine, again, other) == (True, False, True)
    with claimed(tmp_path, "k") as mine:
        assert mine


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_ship_are_valid(path: Path) -> None:
    from _study_arms import ARMS as BUILDERS

    study = load_study(path)
    assert set(study.arms) <= set(BUILDERS)
    # the MoE reads four times the text at every point instead: its answers stand there, not at the end
    enough = {"smallest": 2_000, "moe": 16_000, "moe_second": 16_000}.get(path.stem, 30_000)
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
