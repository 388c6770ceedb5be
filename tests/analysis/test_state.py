"""What an analysis knows: what completes it, and that a report depends on the request alone."""

import math
from dataclasses import replace

import pytest
import torch

from condft.analysis.measure import RTOL, MeasureSpec, UnitInfo, measure
from condft.analysis.state import AnalysisState, current_versions
from condft.report import Role, SkippedWeight, SkipReason, SpectralRow
from condft.weights.unit import Unit

BASIC, ALL = MeasureSpec(), MeasureSpec("all")
SKIPPED = [SkippedWeight("norm", (4,), SkipReason.FEWER_THAN_TWO_DIMENSIONS)]


def unit(index: int) -> Unit:
    values = torch.randn(6 + index, 5, generator=torch.Generator().manual_seed(index))
    return Unit(f"{index}.weight", values, values, "layer" if index % 2 else "other", Role.LAYER)


UNITS = [unit(index) for index in range(4)]
INFOS = {one.name: UnitInfo.of(one) for one in UNITS}


def row(index: int, spec: MeasureSpec = BASIC) -> SpectralRow:
    found = measure(UNITS[index], spec)
    assert found is not None
    return found


def state(spec: MeasureSpec = BASIC, keep: int | None = None, stratify: str | None = None) -> AnalysisState:
    return AnalysisState(INFOS, spec, keep, stratify)


def test_it_is_complete_once_every_unit_has_a_row_or_is_damaged():
    found = state()
    assert found.next_step().exact == list(INFOS)
    for index in range(3):
        assert not found.complete()
        found.add_row(UNITS[index].name, row(index))
    found.add_row(UNITS[3].name, None)
    assert found.complete()
    report = found.report("model", SKIPPED)
    assert report.rows == tuple(row(index) for index in range(3))
    assert {skip.name: skip.reason for skip in report.skipped} == {
        "norm": SkipReason.FEWER_THAN_TWO_DIMENSIONS,
        "3.weight": SkipReason.NON_FINITE,
    }
    assert (report.model, report.versions, report.measures) == ("model", current_versions(), "basic")


def test_a_report_holds_what_was_asked_for_and_the_cache_gets_all():
    rows = {one.name: row(index, MeasureSpec("all", spectrum=True)) for index, one in enumerate(UNITS)}
    found = state()
    found.add_cached(rows, {}, {"torch": "0"})
    assert found.complete()
    assert {(r.log_volume, r.spectrum) for r in found.report("model", []).rows} == {(None, None)}
    assert found.partial_report("model", []).rows == tuple(rows.values())
    assert found.partial_report("model", []).measures == "all"
    assert found.versions == {"torch": "0"}


def test_rows_that_lack_a_measure_are_completed_and_bound_the_figure_meanwhile():
    found = state(ALL, keep=1)
    found.add_cached({"0.weight": row(0)}, {"1.weight": 2.0}, None)
    assert found.versions == current_versions()
    bound = found.bounds["0.weight"]
    assert bound.final
    assert bound.value == pytest.approx(row(0).condition_number, rel=3 * RTOL)
    assert bound.value < row(0).condition_number
    found.add_row("0.weight", replace(row(0, ALL), spectrum=None))
    assert found.rows["0.weight"].log_volume is not None


def test_bounds_only_grow_and_a_damaged_unit_is_no_candidate():
    found = state(keep=1)
    found.add_bound("0.weight", 3.0, final=False)
    found.add_bound("0.weight", 2.0, final=True)
    assert (found.bounds["0.weight"].value, found.bounds["0.weight"].final) == (3.0, True)
    found.add_bound("1.weight", None, final=False)
    assert "1.weight" not in found.next_step().left


@pytest.mark.parametrize("stratify", [None, "module_type"])
def test_the_lowest_are_kept_and_the_others_have_the_bound_of_the_kept(stratify):
    found = state(keep=1, stratify=stratify)
    for index, one in enumerate(UNITS):
        found.add_row(one.name, row(index))
    report = found.report("model", [])
    strata = [UNITS] if stratify is None else [UNITS[::2], UNITS[1::2]]
    lowest = [min((found.rows[one.name].condition_number, one.name) for one in units) for units in strata]
    assert {r.name for r in report.rows} == {name for _, name in lowest}
    assert {screened.condition_number_bound for screened in report.screened} == {value for value, _ in lowest}
    assert not math.isinf(sum(value for value, _ in lowest))
