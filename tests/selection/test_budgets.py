"""Each budget chooses from rankings by hand; through `select_units` they are tested in test_select.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.report import SpectralRow
from condft.selection.budgets import units_below, units_by_count, units_within_fraction
from tests.helpers.records.reports import make_row


def strata(*sizes: list[int]) -> dict[str, list[SpectralRow]]:
    """Stratum a, b, …: units of these numbers of parameters, in the order of their rank."""
    return {
        letter: [make_row(f"{letter}{rank}", num_parameters=count) for rank, count in enumerate(counts)]
        for letter, counts in zip("abcd", sizes, strict=False)
    }


def names(rows: list[SpectralRow]) -> list[str]:
    return sorted(row.name for row in rows)


def test_a_threshold_includes_its_own_value() -> None:
    ranked = [make_row("x", 2.0), make_row("y", 3.0), make_row("z", 3.5)]
    assert names(units_below(ranked, 3.0)) == ["x", "y"]
    with pytest.raises(ValueError, match=r"max_condition_number=1\.5 selects nothing: the lowest of 3 .* is 2 \(x\)"):
        units_below(ranked, 1.5)


def test_counts_go_by_largest_remainders_and_ties_by_name() -> None:
    assert names(units_by_count(strata([1] * 6, [1] * 3), 3)) == ["a0", "a1", "b0"]
    assert names(units_by_count(strata([1], [1], [1]), 2)) == ["a0", "b0"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 50))
def test_a_count_is_met_exactly_and_takes_the_first_of_each_ranking(sizes: list[int], count: int) -> None:
    groups = strata(*([1] * size for size in sizes))
    chosen = units_by_count(groups, count)
    assert len(chosen) == min(count, sum(sizes))
    for rows in groups.values():
        taken = [row in chosen for row in rows]
        assert taken == sorted(taken, reverse=True)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]),
)
def test_a_fraction_is_never_exceeded(sizes: list[list[int]], fraction: float) -> None:
    groups = strata(*sizes)
    total = sum(map(sum, sizes))
    try:
        chosen = units_within_fraction(groups, fraction)
    except ValueError:
        assert min(rows[0].num_parameters for rows in groups.values()) > int(fraction * total)
    else:
        assert sum(row.num_parameters for row in chosen) <= fraction * total + 1e-9
        assert fraction < 1.0 or len(chosen) == sum(map(len, sizes))


def test_what_the_shares_leave_goes_to_the_unit_that_came_nearest_to_fitting() -> None:
    assert names(units_within_fraction(strata([6, 6], [8, 8]), 0.5)) == ["a0", "b0"]
    assert names(units_within_fraction(strata([7, 5], [9, 5]), 0.5)) == ["a0"]  # 6 of 7 fit, against 7 of 9
