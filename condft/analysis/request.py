"""What an analysis is asked for, and which units of a model that means."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from condft.analysis.cache import CachedRows
from condft.analysis.measure import MeasureSpec, UnitInfo
from condft.analysis.state import AnalysisState
from condft.report import SkippedWeight, SkipReason

__all__ = ["Request", "not_requested", "nothing_to_analyze"]


@dataclass(frozen=True)
class Request:
    """What an analysis is asked for; see `analyze` for the arguments.

    Attributes:
        label: Where the weights come from, for people.
        spec: What rows must hold.
        names: Only these units; None for all.
        keep_lowest: Rows for that many units of lowest condition number only.
        stratify: What `keep_lowest` counts within.
    """

    label: str
    spec: MeasureSpec = field(default_factory=MeasureSpec)
    names: frozenset[str] | None = None
    keep_lowest: int | None = None
    stratify: str | None = None

    def select(self, infos: Mapping[str, UnitInfo], skipped: Iterable[SkippedWeight]) -> dict[str, UnitInfo]:
        """The requested ones of all units of a model.

        Raises:
            ValueError: A name that is neither a unit nor a skipped weight.
        """
        if self.names is None:
            return dict(infos)
        # A skipped weight is a known name: the report says why it has no row.
        unknown = sorted(self.names - infos.keys() - {skip.name for skip in skipped})
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(self.names)} names are of no weight of {self.label}, the first is "
                f"{unknown[0]!r}: weights are named as in a report of the same granularity"
            )
        return {name: info for name, info in infos.items() if name in self.names}

    def new_state(self, requested: Mapping[str, UnitInfo], cached: CachedRows | None = None) -> AnalysisState:
        """The state at the start, with what the cache holds."""
        state = AnalysisState(requested, self.spec, self.keep_lowest, self.stratify)
        if cached is not None:
            state.add_cached(cached.rows, cached.bounds, cached.versions)
        return state


def not_requested(infos: Mapping[str, UnitInfo], requested: Collection[str]) -> list[SkippedWeight]:
    """An entry of a report's `skipped` for every unit that was not asked for."""
    return [
        SkippedWeight(name, info.shape, SkipReason.NOT_REQUESTED)
        for name, info in infos.items()
        if name not in requested
    ]


def nothing_to_analyze(label: str, skipped: Sequence[SkippedWeight]) -> str:
    """The message of an error: why a model has no unit, by the reasons of what was skipped."""
    counts = {reason: sum(skip.reason is reason for skip in skipped) for reason in SkipReason}
    reasons = ", ".join(f"{count} {reason.value}" for reason, count in counts.items() if count) or "no parameters"
    way_out = " Load the weights first." if counts[SkipReason.META_DEVICE] else ""
    return f"nothing to analyze in {label}: {reasons}.{way_out}"
