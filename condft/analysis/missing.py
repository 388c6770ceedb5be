"""Measures what an analysis lacks: bounds and rows, step by step, on all processes, until its state is complete."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from condft.analysis.cache import Cache
from condft.analysis.distributed import WorkPlan
from condft.analysis.measure import MeasureSpec, lower_bound, measure, measure_batch
from condft.analysis.screening import LAST_STEPS, Step
from condft.analysis.state import AnalysisState
from condft.report import SkippedWeight, SpectralRow
from condft.weights.unit import Unit

__all__ = ["RowWriter", "measure_missing"]

_WRITE_EVERY = 20.0  # seconds: the work that is lost if the process is killed


@dataclass
class RowWriter:
    """Writes what is known so far into the cache: from time to time while rows come in, and at the end.

    Attributes:
        cache: None where nothing is to be written: without a cache, and on all processes but the first.
        plan: All units of the model.
        digests: Name -> digest, of the requested units.
        state: What is known.
        label: Where the weights come from.
        skipped: Weights that are not among the requested units.
        last: When it wrote last, by the monotonic clock.
    """

    cache: Cache | None
    plan: WorkPlan
    digests: Mapping[str, str]
    state: AnalysisState
    label: str
    skipped: Sequence[SkippedWeight]
    last: float = field(default_factory=time.monotonic)

    def write_if_due(self) -> None:
        """Writes if the last write was more than `_WRITE_EVERY` seconds ago."""
        if time.monotonic() > self.last + _WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes, if there is a cache."""
        if self.cache is not None:
            report = self.state.partial_report(self.label, self.skipped)
            self.cache.write_rows(self.plan.infos, self.digests, report)
            self.last = time.monotonic()


def measure_missing(
    plan: WorkPlan, state: AnalysisState, digests: Mapping[str, str], writer: RowWriter, *, progress: bool
) -> None:
    """Adds bounds and rows to the state until it is complete. All processes call this together.

    Args:
        plan: Who holds and does what.
        state: What is known; the same on every process, before and after.
        digests: Name -> digest, of the units that were looked up in the cache by it.
        writer: Writes rows into the cache; also after an error or Ctrl-C, so that the next call goes on from there.
        progress: Whether this process shows a progress bar.

    Raises:
        ValueError: A weight changed between its look-up in the cache and its measurement.
    """
    # The bar counts cost, not tensors: sizes differ by orders of magnitude, and the time left is right all the same.
    with tqdm(total=1, desc="analyze", unit="flop", unit_scale=True, delay=1, disable=not progress) as bar:
        try:
            while (step := state.next_step(plan.group.size)).left:
                # Set anew at each step: units that were ruled out meanwhile cost nothing.
                bar.total = bar.n + sum(state.infos[name].cost(state.spec) for name in step.left)
                _add_bounds(plan, state, step)
                _add_rows(plan, state, step, digests, writer, bar)
        finally:
            writer.write()


def _add_rows(
    plan: WorkPlan, state: AnalysisState, step: Step, digests: Mapping[str, str], writer: RowWriter, bar: tqdm
) -> None:
    rows = _Rows(plan, state.spec, digests)
    costs = {name: state.infos[name].cost(state.spec) for name in step.exact}
    # Only this process's rows pass by here; each moves the bar by what all processes do in the meantime.
    scale = 1 / (plan.own_share(costs) or 1)

    def note(unit: Unit, row: SpectralRow | None) -> None:
        state.add_row(unit.name, row)  # at once, so that an interruption loses nothing
        bar.update(costs[unit.name] * scale)
        writer.write_if_due()

    # Rows of the other processes; adding this process's own a second time changes nothing.
    for name, row in plan.map(costs, rows.of_unit, batch_work=rows.of_batch, on_result=note).items():
        state.add_row(name, row)


def _add_bounds(plan: WorkPlan, state: AnalysisState, step: Step) -> None:
    sizes = {name: state.infos[name].num_parameters for name in step.bounds}
    bounds = plan.map(sizes, lambda unit: lower_bound(unit, step.bounds[unit.name]))
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
