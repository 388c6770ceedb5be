"""Comparing two reports: rank correlations as before SciPy computed them, changes as they were made."""

import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from condft.report import Role, ScreenedUnit, SpectralReport
from condft.selection.compare import compare_reports, kendall_tau, spearman_rho
from condft.selection.select import select_units
from tests.helpers.records.reports import make_row

pairs_with_ties = st.lists(
    st.tuples(st.integers(0, 6) | st.just(math.inf), st.integers(0, 6) | st.floats(0.5, 2.0)), min_size=2, max_size=40
)


def former_spearman(x: list[float], y: list[float]) -> float:
    """The formula of condft before SciPy's: Pearson's correlation of the ranks."""
    return statistics.correlation(former_ranks(x), former_ranks(y))


def former_ranks(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    starts = [i for i, value in enumerate(ordered) if i == 0 or value != ordered[i - 1]] + [len(ordered)]
    shared = {ordered[start]: 0.5 * (start + 1 + end) for start, end in itertools.pairwise(starts)}
    return [shared[value] for value in values]


def former_kendall(x: list[float], y: list[float]) -> float:
    """The formula of condft before SciPy's: sorted by x, discordant pairs are the inversions of y (Knight 1966)."""
    ordered = sorted(zip(x, y, strict=True))
    seen: list[float] = []
    discordant = 0
    for _, value in ordered:
        discordant += len(seen) - bisect_right(seen, value)
        insort(seen, value)
    n0, n1, n2, n3 = math.comb(len(x), 2), tied_pairs(x), tied_pairs(y), tied_pairs(ordered)
    concordant = n0 - n1 - n2 + n3 - discordant
    return (concordant - discordant) / math.sqrt((n0 - n1) * (n0 - n2))


def tied_pairs(values: Iterable[object]) -> int:
    return sum(math.comb(count, 2) for count in Counter(values).values())


@given(pairs_with_ties)
def test_rank_correlations_are_those_of_the_former_formulas(pairs):
    x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    assert spearman_rho(x, y) == pytest.approx(former_spearman(x, y), abs=1e-14)
    assert kendall_tau(x, y) == pytest.approx(former_kendall(x, y), abs=1e-14)


def test_rank_correlations_at_their_ends():
    assert spearman_rho([1.0, 2.0, math.inf], [5.0, 6.0, math.inf]) == pytest.approx(1.0)
    assert kendall_tau([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert spearman_rho([1.0, 1.0], [1.0, 2.0]) is None
    assert kendall_tau([], []) is None
    with pytest.raises(ValueError, match="expected pairs, got 1 and 2"):
        kendall_tau([1.0], [1.0, 2.0])


def report(kappas: list[float], model: str = "m") -> SpectralReport:
    return SpectralReport(tuple(make_row(f"l.{i}.q.weight", k) for i, k in enumerate(kappas)), model=model)


def test_a_report_compared_with_itself():
    found = compare_reports(report([2.0, 3.0, 4.0]), report([2.0, 3.0, 4.0]), counts=[2])
    assert (found.overall.condition_number, found.overall.num_changed) == (0.0, 0)
    assert found.overall.spearman == pytest.approx(1.0)
    assert [(k.count, k.across, k.within) for k in found.kept] == [(2, 2, 2)]


def test_what_stays_is_counted_among_the_candidates_of_a_selection():
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


def test_importing_the_module_does_not_import_scipy():
    program = "import sys, condft.selection.compare; print('scipy' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.split() == ["False", "False"]


def test_reports_that_cannot_be_compared():
    other = SpectralReport((make_row("elsewhere.weight", 2.0),), model="n")
    with pytest.raises(ValueError, match=r"no unit of m \(1 units, such as l.0.q.weight\)"):
        compare_reports(report([2.0]), other)
    ruled_out = ScreenedUnit("u", (2, 2), 4, "u", Role.LAYER, 9.0)
    with pytest.raises(ValueError, match=r"report B .* lacks 1 units"):
        compare_reports(report([2.0]), dataclasses.replace(report([2.0]), screened=(ruled_out,)))
    with pytest.raises(ValueError, match="one under 1"):
        compare_reports(report([2.0]), report([2.0]), counts=[0])
