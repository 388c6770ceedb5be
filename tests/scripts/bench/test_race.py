"""Rounds and ratios of what is timed turn and turn about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench.race import MIN_ROUNDS, Runs, medians, race, ratio

taken = st.lists(st.floats(0.1, 10), min_size=2, max_size=9)


def runs_of(**seconds: list[float]) -> Runs:
    return {name: {"seconds": values, "cpu_seconds": [2 * v for v in values]} for name, values in seconds.items()}


def test_everyone_runs_once_a_round_and_the_first_place_goes_round() -> None:
    order: list[str] = []
    ticks: list[int] = []
    runs = race(
        {name: lambda name=name: order.append(name) for name in "abc"},
        rounds=4,
        before={"b": lambda: order.append("before b")},
        tick=lambda: ticks.append(len(order)),
    )
    warm_up, *rounds = [order[start : start + 4] for start in range(0, 20, 4)]
    assert warm_up == ["a", "before b", "b", "c"]
    assert [[name for name in each if len(name) == 1] for each in rounds] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]
    assert all(each[each.index("b") - 1] == "before b" for each in rounds)
    assert len(ticks) == 4
    assert {len(values) for clocks in runs.values() for values in clocks.values()} == {4}


def test_no_round_begins_after_the_time_is_up_but_a_few_are_run() -> None:
    runs = race({"a": lambda: None, "b": lambda: None}, rounds=50, seconds=0.0)
    assert len(runs["a"]["seconds"]) == len(runs["b"]["cpu_seconds"]) == MIN_ROUNDS


@given(taken, st.floats(0.25, 4))
def test_what_slows_a_round_for_both_leaves_the_ratio_alone(theirs: list[float], factor: float) -> None:
    found = ratio(runs_of(ours=[factor * value for value in theirs], theirs=theirs), "ours", "theirs")
    for key in ("ratio", "low", "high", "cpu_ratio"):
        assert found[key] == pytest.approx(factor)
    assert found["rounds"] == len(theirs)


def test_the_median_and_the_middle_half_of_the_pairs() -> None:
    runs = runs_of(ours=[1.0, 2.0, 3.0, 4.0, 100.0], theirs=[1.0, 1.0, 1.0, 1.0, 1.0])
    found = ratio(runs, "ours", "theirs")
    assert (found["low"], found["ratio"], found["high"]) == (2.0, 3.0, 4.0)
    assert medians(runs)["ours"] == {"seconds": 3.0, "cpu_seconds": 6.0}
