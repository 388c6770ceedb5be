"""Measuring what is missing: every unit once, the state complete afterwards, and no row of values that changed."""

import pytest
import torch
from torch import nn

from condft.analysis import missing
from condft.analysis.cache import Cache, open_cache
from condft.analysis.distributed import WorkPlan, share_units
from condft.analysis.measure import MeasureSpec, measure
from condft.analysis.missing import RowWriter, measure_missing
from condft.analysis.request import Request
from condft.analysis.state import AnalysisState
from condft.files.hashing import tensor_digest
from condft.report import Role, SpectralReport
from condft.runtime.process_group import ProcessGroup
from condft.weights.unit import DeferredWeight, Unit
from condft.weights.walk import iter_units


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8 + index, 6) for index in range(5)))


def plan_and_state(**options: object) -> tuple[WorkPlan, AnalysisState]:
    plan = share_units(iter_units(model()), ProcessGroup())
    request = Request("model", **options)  # type: ignore[arg-type]
    return plan, request.new_state(request.select(plan.infos, plan.skipped))


def writer_of(plan: WorkPlan, state: AnalysisState, cache: Cache | None = None) -> RowWriter:
    digests = {name: tensor_digest(unit.tensor) for name, unit in plan.units.items() if unit.deferred is None}
    return RowWriter(cache, plan, digests, state, "model", [])


def test_rows_are_written_when_due_and_at_the_end_also_of_an_error(tmp_path, monkeypatch):
    plan, state = plan_and_state()
    writer = writer_of(plan, state, open_cache(tmp_path))
    writer.write_if_due()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(missing, "measure", lambda unit, *rest: measure(unit, *rest) if unit.name < "3" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_missing(plan, state, writer.digests, writer, progress=False)
    (file,) = tmp_path.iterdir()
    assert [row.name for row in SpectralReport.load(file).rows] == ["0.weight", "1.weight", "2.weight"]
    file.unlink()
    monkeypatch.setattr(missing, "_WRITE_EVERY", 0.0)
    writer.write_if_due()
    assert file.is_file()


def test_every_unit_is_measured_once_and_noted_at_once(monkeypatch):
    plan, state = plan_and_state()
    counts: list[int] = []
    writer = writer_of(plan, state)
    monkeypatch.setattr(writer, "write_if_due", lambda: counts.append(len(state.rows)))
    measure_missing(plan, state, {}, writer, progress=False)
    assert state.complete()
    assert counts == [1, 2, 3, 4, 5]
    assert state.rows == {name: measure(unit, MeasureSpec()) for name, unit in plan.units.items()}


def test_only_what_is_missing_is_measured(monkeypatch):
    plan, state = plan_and_state()
    state.add_row("0.weight", measure(plan.units["0.weight"], MeasureSpec()))
    measured: list[str] = []
    monkeypatch.setattr(missing, "measure", lambda unit, *rest: measured.append(unit.name) or measure(unit, *rest))
    measure_missing(plan, state, {}, writer_of(plan, state), progress=False)
    assert sorted(measured) == [f"{index}.weight" for index in range(1, 5)]


def test_the_lowest_are_found_by_bounds_first():
    plan, state = plan_and_state(keep_lowest=1)
    measure_missing(plan, state, {}, writer_of(plan, state), progress=False)
    assert state.complete()
    assert state.bounds.keys() == plan.units.keys()
    exact = {name: measure(unit, MeasureSpec()) for name, unit in plan.units.items()}
    assert min(exact.values(), key=lambda row: row.condition_number) in state.rows.values()


def test_values_that_changed_since_the_look_up_are_refused():
    """What is in memory cannot have changed unseen; what is read a second time can."""
    before, after = torch.ones(4, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    deferred = DeferredWeight((4, 3), torch.float32, lambda: after)
    unit = Unit("w", deferred.stand_in, deferred.stand_in, "w", Role.LAYER, deferred)
    plan = share_units([unit], ProcessGroup())
    state = Request("model").new_state(plan.infos)
    with pytest.raises(ValueError, match="w has changed since this analysis began"):
        measure_missing(plan, state, {"w": tensor_digest(before)}, writer_of(plan, state), progress=False)
    assert not state.rows
    measure_missing(plan, state, {"w": tensor_digest(after)}, writer_of(plan, state), progress=False)
    assert state.complete()
