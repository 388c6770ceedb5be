"""Measures what an analysis lacks: bounds and rows, step by step, on all processes, until its state is complete."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from condft.analysis.distributed import WorkPlan
from condft.analysis.measure import MeasureSpec, UnitInfo, lower_bound, measure, measure_batch
from condft.analysis.screening import LAST_STEPS, Step
from condft.analysis.state import AnalysisState
from condft.report import SpectralRow
from condft.weights.unit import Unit

__all__ = ["measure_missing"]


def measure_missing(
    plan: WorkPlan,
    state: AnalysisState,
    digests: Mapping[str, str],
    *,
    progress: bool,
    on_row: Callable[[], None] = lambda: None,
) -> None:
    """Adds bounds and rows to the state until it is complete. All processes call this together.

    Args:
        plan: Who holds and does what.
        state: What is known; the same on every process, before and after.
        digests: Name -> digest, of the units that were looked up in the cache by it.
        progress: Whether this process shows a progress bar.
        on_row: Called after each row that this process adds.

    Raises:
        ValueError: A weight changed between its look-up in the cache and its measurement.
    """

    def cost(info: UnitInfo) -> float:
        return info.cost(state.spec)

    rows = _Rows(plan, state.spec, digests)
    # The bar counts cost, not tensors: sizes differ by orders of magnitude, and the time left is right all the same.
    with tqdm(total=1, desc="analyze", unit="flop", unit_scale=True, delay=1, disable=not progress) as bar:
        while (step := state.next_step(plan.group.size)).left:
            bar.total = bar.n + sum(cost(state.infos[name]) for name in step.left)
            _add_bounds(plan, state, step)
            # Only this process's rows pass by here; each moves the bar by what all processes do in the meantime.
            scale = 1 / (plan.own_share(step.exact, cost) or 1)

            def note(unit: Unit, row: SpectralRow | None, scale: float = scale) -> None:
                state.add_row(unit.name, row)  # at once, so that an interruption loses nothing
                bar.update(cost(state.infos[unit.name]) * scale)
                on_row()

            found = plan.map(step.exact, cost, rows.of_unit, batch_work=rows.of_batch, on_result=note)
            for name, row in found.items():
                state.add_row(name, row)


def _add_bounds(plan: WorkPlan, state: AnalysisState, step: Step) -> None:
    bounds = plan.map(
        list(step.bounds),
        lambda info: info.num_parameters,
        lambda unit: lower_bound(unit, step.bounds[unit.name]),
    )
    for name, value in bounds.items():
        state.add_bound(name, value, final=step.bounds[name] == LAST_STEPS)


@dataclass(frozen=True)
class _Rows:
    """Measures units whose values are in memory."""

    plan: WorkPlan
    spec: MeasureSpec
    digests: Mapping[str, str]

    def of_unit(self, unit: Unit) -> SpectralRow | None:
        return self._checked(unit, measure(unit, self.spec, self._known_digest(unit)))

    def of_batch(self, units: Sequence[Unit]) -> list[SpectralRow | None]:
        rows = measure_batch(units, self.spec, [self._known_digest(unit) for unit in units])
        return [self._checked(unit, row) for unit, row in zip(units, rows, strict=True)]

    def _known_digest(self, unit: Unit) -> str | None:
        # Values that were in memory all along need no second hash. Values that were read again do, see `_checked`.
        return self.digests.get(unit.name) if self.plan.units[unit.name].deferred is None else None

    def _checked(self, unit: Unit, row: SpectralRow | None) -> SpectralRow | None:
        """The row, if its values are those that were looked up in the cache: else it would be stored as theirs."""
        if row is not None and self.digests.get(unit.name, row.digest) != row.digest:
            raise ValueError(
                f"{unit.name} has changed since this analysis began: analyze again once nothing writes to it"
            )
        return row
