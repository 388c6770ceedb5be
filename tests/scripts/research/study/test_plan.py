"""The order of the runs, their keys, and the choice of a rate."""

from hypothesis import given
from hypothesis import strategies as st

from scripts.research.config import ArmSection
from scripts.research.study.plan import RunSpec, best_of_sweep, count_runs, plan_runs, run_key, sweep_order

ARMS = {
    "other": ArmSection(rates=[0.1]),
    "first": ArmSection(rates=[0.1, 0.2, 0.4], main=True),
    "second": ArmSection(rates=[1.0, 2.0], main=True),
}
rates = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6)
studies = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.builds(ArmSection, rates=rates, main=st.booleans()), max_size=4
)


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


def test_a_key_depends_on_everything_that_determines_a_run() -> None:
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
