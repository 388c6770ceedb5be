"""What an analysis knows so far, what it still needs, and the report that it ends in."""

import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from condft.analysis.measure import ALGORITHM_VERSION, RTOL, MeasureSpec, UnitInfo, merged_row
from condft.analysis.screening import Bound, Screening, Step
from condft.report import ScreenedUnit, SkippedWeight, SkipReason, SpectralReport, SpectralRow

__all__ = ["AnalysisState", "current_versions"]


@dataclass
class AnalysisState:
    """What is known about the requested units. It is the same on every process after each step.

    Attributes:
        infos: Name -> unit.
        spec: What rows must hold.
        keep_lowest: As in `analyze`; None for a row of every unit.
        stratify: As in `analyze`.
        rows: Name -> row, which may hold less or more than `spec` asks for.
        bounds: Name -> lower bound of the condition number.
        non_finite: Units that hold NaN or infinity.
        versions: Of the software that computed the rows and bounds.
    """

    infos: Mapping[str, UnitInfo]
    spec: MeasureSpec
    keep_lowest: int | None
    stratify: str | None
    rows: dict[str, SpectralRow] = field(default_factory=dict)
    bounds: dict[str, Bound] = field(default_factory=dict)
    non_finite: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=lambda: current_versions())  # defined below, so not by name

    def add_cached(
        self, rows: Mapping[str, SpectralRow], bounds: Mapping[str, float], versions: dict[str, str] | None
    ) -> None:
        """Takes over what the cache holds.

        Args:
            rows: Name -> row.
            bounds: Name -> lower bound.
            versions: Of the software that computed them, if it is the same for all.
        """
        self.versions = versions or self.versions
        self.rows = dict(rows)
        # Not final: the cache does not say how many products they took.
        self.bounds = {name: Bound(value) for name, value in bounds.items()}
        for row in rows.values():
            if not self.spec.satisfied_by(row) and row.name not in self.bounds:
                # The row lacks a measure, but its condition number is known: it serves as a bound. It is final, since
                # more products cannot come closer than the figure itself. Twice the tolerance keeps it a lower bound.
                self.bounds[row.name] = Bound(row.condition_number * (1 - 2 * RTOL), final=True)

    def add_row(self, name: str, row: SpectralRow | None) -> None:
        """Adds a measured row; None for a unit that holds NaN or infinity."""
        if row is None:
            self.non_finite.add(name)
        else:
            self.rows[name] = merged_row(row, self.rows.get(name))

    def add_bound(self, name: str, value: float | None, *, final: bool) -> None:
        """Adds a bound; None for a unit that holds NaN or infinity."""
        if value is None:
            self.non_finite.add(name)
            return
        before = self.bounds.get(name)
        self.bounds[name] = Bound(value if before is None else max(value, before.value), final)

    def next_step(self, batch: int = 1) -> Step:
        """What is needed next; nothing is `left` when the report is complete. `batch`: see `Screening.next_step`."""
        if self.keep_lowest is None:
            known = self._exact()
            missing = [name for name in self.infos if name not in known and name not in self.non_finite]
            return Step(exact=missing, left=missing)
        return self._screening(self.keep_lowest).next_step(self._exact(), self.bounds, batch)

    def complete(self) -> bool:
        """Whether the report needs nothing more."""
        return not self.next_step().left

    def report(self, label: str, skipped: Sequence[SkippedWeight]) -> SpectralReport:
        """The report of a complete analysis: exactly what was asked for, even if more is known.

        Args:
            label: Where the weights came from.
            skipped: Weights that are not among the requested units.
        """
        names, others = set(self.rows), dict[str, float]()
        if self.keep_lowest is not None:
            names, others = self._screening(self.keep_lowest).outcome(self._exact())
        rows = tuple(self.spec.trimmed(row) for name, row in self.rows.items() if name in names)
        damaged = [SkippedWeight(name, self.infos[name].shape, SkipReason.NON_FINITE) for name in self.non_finite]
        screened = tuple(self._screened_unit(name, value) for name, value in others.items())
        return SpectralReport(rows, (*skipped, *damaged), label, self.versions, self.spec.measures, screened)

    def partial_report(self, label: str, skipped: Sequence[SkippedWeight]) -> SpectralReport:
        """All that is known, complete or not, as a report for the cache. Arguments as of `report`."""
        rows = tuple(self.rows.values())
        measures = "all" if all(row.log_volume is not None for row in rows) else "basic"
        screened = tuple(
            self._screened_unit(name, bound.value) for name, bound in self.bounds.items() if name not in self.rows
        )
        return SpectralReport(rows, tuple(skipped), label, self.versions, measures, screened)

    def _exact(self) -> dict[str, float]:
        return {name: row.condition_number for name, row in self.rows.items() if self.spec.satisfied_by(row)}

    def _screening(self, keep: int) -> Screening:
        # Without damaged units: they never get a figure, so the search would never end.
        strata: dict[str, list[str]] = defaultdict(list)
        for name, info in self.infos.items():
            if name not in self.non_finite:
                strata[info.module_type if self.stratify else ""].append(name)
        return Screening(strata, keep, RTOL)

    def _screened_unit(self, name: str, value: float) -> ScreenedUnit:
        info = self.infos[name]
        return ScreenedUnit(name, info.shape, info.num_parameters, info.module_type, info.role, value)


def current_versions() -> dict[str, str]:
    """The versions of Python, torch and the algorithm that run now."""
    return {"python": platform.python_version(), "torch": torch.__version__, "algorithm": str(ALGORITHM_VERSION)}
