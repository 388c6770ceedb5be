"""Two reports beside each other: rank correlations as SciPy's, changes as they were made."""

import dataclasses
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from condft.report import Role, ScreenedUnit, SpectralReport
from condft.selection.compare import compare_reports, kendall_tau, spearman_rho
from condft.selection.select import select_units
from tests.helpers.reports import make_row

tied = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=40)


@given(tied)
def test_rank_correlations_are_scipys(pairs):
    x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    assert spearman_rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


def test_rank_correlations_at_their_ends():
    assert spearman_rho([1.0, 2.0, math.inf], [5.0, 6.0, math.inf]) == pytest.approx(1.0)
    assert kendall_tau([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert spearman_rho([1.0, 1.0], [1.0, 2.0]) is None
    assert kendall_tau([], []) is None
    with pytest.raises(ValueError, match="expected pairs, got 1 and 2"):
        kendall_tau([1.0], [1.0, 2.0])


def report(kappas: list[float], model: str = "m") -> SpectralReport:
    return SpectralReport(tuple(make_row(f"l.{i}.q.weight", k) for i, k in enumerate(kappas)), model=model)


def test_a_report_beside_itself():
    found = compare_reports(report([2.0, 3.0, 4.0]), report([2.0, 3.0, 4.0]), counts=[2])
    assert (found.overall.condition_number, found.overall.num_changed) == (0.0, 0)
    assert found.overall.spearman == pytest.approx(1.0)
    assert [(k.count, k.across, k.within) for k in found.kept] == [(2, 2, 2)]


def test_what_stays_is_told_of_the_candidates_of_a_selection():
    roles = (Role.LAYER, Role.EXPERT, Role.EXPERT, Role.ROUTER, Role.EMBEDDING)
    rows = tuple(make_row(f"l.{i}.weight", 2.0 + i, role=role) for i, role in enumerate(roles))
    found = SpectralReport(rows)
    assert compare_reports(found, found).num_candidates == select_units(found).num_candidates == 3


def test_changes_are_medians_of_log_ratios_and_lost_ranks_are_counted():
    found = compare_reports(report([2.0, 3.0, 4.0, 5.0]), report([4.0, 3.0, 8.0, math.inf]), counts=[1])
    assert found.overall.condition_number == pytest.approx(math.log(2.0))
    assert (found.overall.rank_lost, found.overall.rank_gained) == (1, 0)
    assert (found.kept[0].across, found.num_candidates) == (0, 4)


def test_units_without_a_counterpart_are_named():
    a, b = report([2.0, 3.0, 4.0]), report([2.0, 3.0])
    found = compare_reports(a, b)
    assert (found.only_in_a, found.only_in_b, found.other_shape) == (("l.2.q.weight",), (), ())
    wide = dataclasses.replace(b.rows[0], shape=(99, 1))
    found = compare_reports(a, SpectralReport((wide, b.rows[1])))
    assert found.other_shape == ("l.0.q.weight",)
    assert found.overall.num_units == 1


def test_reports_that_cannot_be_compared():
    other = SpectralReport((make_row("elsewhere.weight", 2.0),), model="n")
    with pytest.raises(ValueError, match=r"no unit of m \(1 units, such as l.0.q.weight\)"):
        compare_reports(report([2.0]), other)
    ruled_out = ScreenedUnit("u", (2, 2), 4, "u", Role.LAYER, 9.0)
    with pytest.raises(ValueError, match=r"report B .* lacks 1 units"):
        compare_reports(report([2.0]), dataclasses.replace(report([2.0]), screened=(ruled_out,)))
    with pytest.raises(ValueError, match="one under 1"):
        compare_reports(report([2.0]), report([2.0]), counts=[0])
