"""Measuring what is missing: every unit once, the state complete afterwards, and no row of values that changed."""

import pytest
import torch
from torch import nn

from condft.analysis import missing
from condft.analysis.distributed import WorkPlan, share_units
from condft.analysis.measure import MeasureSpec, measure
from condft.analysis.missing import measure_missing
from condft.analysis.request import Request
from condft.analysis.state import AnalysisState
from condft.files.hashing import tensor_digest
from condft.report import Role
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


def test_every_unit_is_measured_once_and_noted_at_once():
    plan, state = plan_and_state()
    counts: list[int] = []
    measure_missing(plan, state, {}, progress=False, on_row=lambda: counts.append(len(state.rows)))
    assert state.complete()
    assert counts == [1, 2, 3, 4, 5]
    assert state.rows == {name: measure(unit, MeasureSpec()) for name, unit in plan.units.items()}


def test_only_what_is_missing_is_measured(monkeypatch):
    plan, state = plan_and_state()
    state.add_row("0.weight", measure(plan.units["0.weight"], MeasureSpec()))
    measured: list[str] = []
    monkeypatch.setattr(missing, "measure", lambda unit, *rest: measured.append(unit.name) or measure(unit, *rest))
    measure_missing(plan, state, {}, progress=False)
    assert sorted(measured) == [f"{index}.weight" for index in range(1, 5)]


def test_the_lowest_are_found_by_bounds_first():
    plan, state = plan_and_state(keep_lowest=1)
    measure_missing(plan, state, {}, progress=False)
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
        measure_missing(plan, state, {"w": tensor_digest(before)}, progress=False)
    assert not state.rows
    measure_missing(plan, state, {"w": tensor_digest(after)}, progress=False)
    assert state.complete()
