"""The search for the k lowest: what it finds, what it spares, and that the order of work does not matter."""

import math
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from condft.analysis.screening import FIRST_STEPS, LAST_STEPS, Bound, Screening

RTOL = 1e-3
CONDITION_NUMBERS = st.lists(st.floats(1.0, 1e6) | st.just(math.inf), min_size=1, max_size=25)


def search(
    truth: Mapping[str, float], strata: Mapping[str, list[str]], keep: int, batch: int, sharpness: float
) -> tuple[set[str], dict[str, float], set[str]]:
    """Does every step until the search ends, with bounds of this part of the truth; also returns what was measured."""
    screening = Screening(strata, keep, RTOL)
    exact: dict[str, float] = {}
    bounds: dict[str, Bound] = {}
    for _ in range(1000):
        step = screening.next_step(exact, bounds, batch)
        if not step.left:
            return *screening.outcome(exact), set(exact)
        assert step.bounds or step.exact
        assert set(step.bounds.values()) <= {FIRST_STEPS, LAST_STEPS}
        assert not set(step.exact) & exact.keys()  # no unit is measured twice
        bounds |= {name: Bound(truth[name] * sharpness, spent == LAST_STEPS) for name, spent in step.bounds.items()}
        exact |= {name: truth[name] for name in step.exact}
    raise AssertionError("the search does not end")


@given(values=CONDITION_NUMBERS, keep=st.integers(1, 6), sharpness=st.floats(0.01, 1.0), batch=st.integers(1, 4))
def test_it_keeps_the_k_lowest_however_sharp_the_bounds_and_large_the_batches(values, keep, sharpness, batch):
    truth = {f"unit{index}": value for index, value in enumerate(values)}
    kept, others, _ = search(truth, {"": list(truth)}, keep, batch, sharpness)
    ranked = sorted((value, name) for name, value in truth.items())
    assert kept == {name for _, name in ranked[:keep]}
    assert others.keys() == truth.keys() - kept
    assert all(bound == ranked[:keep][-1][0] for bound in others.values())


@given(values=CONDITION_NUMBERS, keep=st.integers(1, 3))
def test_strata_are_searched_apart(values, keep):
    truth = {f"unit{index}": value for index, value in enumerate(values)}
    strata = {"even": list(truth)[::2], "odd": list(truth)[1::2]}
    kept, _, _ = search(truth, strata, keep, 1, 0.9)
    for names in strata.values():
        assert kept.intersection(names) == set(sorted(names, key=lambda name: (truth[name], name))[:keep])


def test_sharp_bounds_spare_all_measurements_but_those_of_the_kept():
    truth = {f"unit{index}": 10.0 + index for index in range(20)}
    _, _, measured = search(truth, {"": list(truth)}, 3, 1, 0.999)
    assert measured == {"unit0", "unit1", "unit2"}


def test_a_bound_within_the_error_of_the_figures_rules_nothing_out():
    screening = Screening({"": ["a", "b"]}, 1, RTOL)
    near = Bound(10.0 * (1 + 2 * RTOL), final=True)
    assert screening.next_step({"a": 10.0}, {"b": near}, 1).exact == ["b"]
    far = Bound(10.0 * (1 + 4 * RTOL), final=True)
    assert screening.next_step({"a": 10.0}, {"b": far}, 1).left == []


def test_where_all_are_kept_no_bound_is_computed():
    step = Screening({"": ["a", "b"]}, 2, RTOL).next_step({}, {}, 1)
    assert (step.exact, step.bounds) == (["a", "b"], {})
