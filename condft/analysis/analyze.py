"""`analyze`: weights -> spectra -> report, for a live model or a checkpoint that is never instantiated.

The order of work: the cache is asked first, for a checkpoint without building its model. Then the units are walked,
hashed, looked up by their content, and measured where nothing is known of them; each by one rank.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from condft.analysis.cache import Cache, CachedRows, FolderFingerprint, WeightIndex, open_cache
from condft.analysis.distributed import WorkPlan, walk_together
from condft.analysis.measure import MeasureSpec, UnitInfo, lower_bound, measure, measure_together
from condft.analysis.screening import LAST_STEPS, Step
from condft.analysis.state import AnalysisState, current_versions
from condft.report import SkippedWeight, SkipReason, SpectralReport, SpectralRow
from condft.runtime.process_group import ProcessGroup
from condft.selection.select import Stratify, check_stratify
from condft.spectra import Measures, check_measures
from condft.weights.checkpoint import checkpoint_folder
from condft.weights.unit import Unit
from condft.weights.walk import Granularity, iter_checkpoint_units, iter_units

__all__ = ["NonFiniteWeightError", "analyze"]

_STORE_EVERY = 20.0  # seconds; what an interruption may cost


class NonFiniteWeightError(ValueError):
    """Some weights hold NaN or infinity, so they have no spectrum.

    Attributes:
        names: All units concerned.
        report: The report of all the others.
    """

    def __init__(self, names: list[str], report: SpectralReport) -> None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        super().__init__(
            f"NaN or infinity in {len(names)} of {len(names) + len(report.rows)} weights: {shown}. The checkpoint is "
            "damaged or training diverged; the report has rows of the other weights only."
        )
        self.names = names
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.names, self.report)


def analyze(
    model: nn.Module | str | Path,
    *,
    names: Collection[str] | None = None,
    granularity: Granularity = "tensor",
    measures: Measures = "basic",
    keep_lowest: int | None = None,
    stratify: Stratify | None = None,
    spectrum: bool = False,
    cache: bool | str | Path = True,
    shared: bool = True,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> SpectralReport:
    """Spectral facts of every weight tensor of two or more dimensions.

    Args:
        model: A live model (also one with PEFT adapters: its base weights are analyzed), or a checkpoint folder or
            hub id, whose weights are read one at a time without ever building the model.
        names: Only these units; all others are listed as not requested.
        granularity: "tensor", or "head": attention weights head by head (see `condft.weights.heads`).
        measures: "basic": condition number, its two ends, Frobenius norm and stable rank. "all" adds log-volume and
            entropy deficit, which need a factorization of every weight.
        keep_lowest: Figures for that many units of lowest condition number only (in each module type if `stratify`),
            ties by name: those that a whole analysis would rank lowest. The others are listed in `screened` with the
            highest condition number kept as their bound; most are ruled out by a few products, without a
            factorization.
        stratify: What `keep_lowest` counts within.
        spectrum: Keep all singular values of every unit too (an SVD each).
        cache: Whether to use rows that were found before and keep new ones, by the content of the weights: True for
            the user's cache (`$CONDFT_CACHE`, else `~/.cache/condft`; `CONDFT_CACHE=off` turns it off), or a folder.
            Rows found with more measures, or on another device, serve too: they agree to `relative_error`.
        shared: Under torch.distributed, whether the ranks share the work: all must then call this, and all get the
            whole report. False where one of them analyzes alone.
        progress: Show a progress bar on stderr, by cost (on the first rank).
        trust_remote_code: For a checkpoint folder whose architecture is not transformers' own.

    Returns:
        The report. The model is not modified, nor any random state.

    Raises:
        FileNotFoundError: A folder that is no checkpoint, or one whose files are missing.
        NonFiniteWeightError: Weights with NaN or infinity; the error carries the report of the rest.
        ValueError: Nothing to analyze (says what was skipped and why), a damaged checkpoint (names the file), ranks
            that hold different models, `keep_lowest` under 1, names that the model lacks, or an unknown option.
    """
    check_measures(measures)
    check_stratify(stratify)
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string: give a collection such as {[names]}")
    if keep_lowest is not None and keep_lowest < 1:
        raise ValueError(f"keep_lowest={keep_lowest} keeps nothing: it must be at least 1")
    ranks = ProcessGroup(shared=shared)
    label = str(model) if isinstance(model, str | Path) else type(model).__name__
    # The first rank's arguments hold on all of them: another one that has no weights may not know the names.
    label, asked, store = ranks.from_first(lambda: (label, None if names is None else set(names), open_cache(cache)))
    work = _Analysis(ranks, label, asked, MeasureSpec(measures, spectrum), keep_lowest, stratify, store)
    if isinstance(model, nn.Module):
        return work.run(lambda: iter_units(model, granularity=granularity), progress=progress)
    stamp = catalog = None
    if store is not None:
        stamp, catalog = ranks.from_first(lambda: _recall(store, model, granularity, trust_remote_code))
        report = None if catalog is None else work.from_cache(catalog)
        if report is not None:
            return report
    return work.run(
        lambda: iter_checkpoint_units(model, granularity=granularity, trust_remote_code=trust_remote_code),
        progress=progress,
        stamp=stamp,
        digests={} if catalog is None else catalog.digests,
    )


def _recall(
    store: Cache, path: str | Path, granularity: str, trust_remote_code: bool
) -> tuple[FolderFingerprint, WeightIndex | None]:
    folder = checkpoint_folder(path, trust_remote_code=trust_remote_code)
    stamp = FolderFingerprint.of(folder, granularity, trust_remote_code=trust_remote_code)
    return stamp, store.recall(stamp)


@dataclass
class _Analysis:
    """One call of `analyze`; the arguments are those of the first rank. `store` is used by the first rank alone."""

    ranks: ProcessGroup
    label: str
    names: set[str] | None
    wanted: MeasureSpec
    keep_lowest: int | None
    stratify: str | None
    store: Cache | None

    def from_cache(self, catalog: WeightIndex) -> SpectralReport | None:
        """The report of a checkpoint whose units are known, if the cache has all of it."""
        infos = {info.name: info for info in catalog.infos}
        asked = self._asked(infos, catalog.skipped)
        if not asked or not catalog.digests.keys() >= asked.keys():
            return None
        digests = {name: catalog.digests[name] for name in asked}
        findings = self._look_up(infos, digests)
        skipped = [*catalog.skipped, *_not_requested(infos, asked)]
        return findings.report(self.label, skipped) if findings.complete() else None

    def run(
        self,
        walk: Callable[[], Iterable[Unit | SkippedWeight]],
        *,
        progress: bool,
        stamp: FolderFingerprint | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> SpectralReport:
        """Walks, looks up, measures. `digests` are those that are known already, of a checkpoint with this `stamp`."""
        shares, skipped = walk_together(self.ranks, walk)
        asked = self._asked(shares.infos, skipped)
        everything_skipped = [*skipped, *_not_requested(shares.infos, asked)]
        if not asked:
            raise ValueError(_nothing_to_analyze(self.label, everything_skipped))
        if self.store is None:
            findings, digests = self._findings(asked), {}
        else:
            if digests is None or not digests.keys() >= asked.keys():
                digests = shares.digests(list(asked))
            digests = {name: digests[name] for name in asked}
            if stamp is not None and self.ranks.first:
                self.store.remember(stamp, WeightIndex(tuple(shares.infos.values()), tuple(skipped), dict(digests)))
            findings = self._look_up(shares.infos, digests)
        if not findings.complete():
            keeper = _Keeper(self, shares.infos, findings, digests, everything_skipped)
            findings.versions = current_versions()
            _find_out(shares, findings, digests, keeper, progress=progress and self.ranks.first)
        report = findings.report(self.label, everything_skipped)
        if findings.non_finite:
            raise NonFiniteWeightError(sorted(findings.non_finite), report)
        return report

    def _asked(self, infos: Mapping[str, UnitInfo], skipped: Iterable[SkippedWeight]) -> dict[str, UnitInfo]:
        if self.names is None:
            return dict(infos)
        unknown = sorted(self.names - infos.keys() - {skip.name for skip in skipped})
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(self.names)} names are of no weight of {self.label}, the first is "
                f"{unknown[0]!r}: weights are named as in a report of the same granularity"
            )
        return {name: info for name, info in infos.items() if name in self.names}

    def _findings(self, asked: Mapping[str, UnitInfo]) -> AnalysisState:
        return AnalysisState(asked, self.wanted, self.keep_lowest, self.stratify)

    def _look_up(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]) -> AnalysisState:
        """What the cache knows of these units, on every rank."""
        store = self.store
        assert store is not None
        asked = {name: infos[name] for name in digests}

        def with_known(known: CachedRows) -> AnalysisState:
            findings = self._findings(asked)
            findings.know(known.rows, known.bounds, known.versions)
            return findings

        return with_known(
            self.ranks.from_first(lambda: store.find(infos, digests, lambda k: with_known(k).complete()))
        )


@dataclass
class _Keeper:
    """Stores what is known so far: in the first rank, now and then and at the end, however that comes."""

    analysis: _Analysis
    infos: Mapping[str, UnitInfo]
    findings: AnalysisState
    digests: Mapping[str, str]
    skipped: Sequence[SkippedWeight]
    last: float = field(default_factory=time.monotonic)

    def keep(self, *, now: bool = False) -> None:
        store = self.analysis.store
        if store is None or not self.analysis.ranks.first or not (now or time.monotonic() > self.last + _STORE_EVERY):
            return
        store.store(self.infos, self.digests, self.findings.everything(self.analysis.label, self.skipped))
        self.last = time.monotonic()


def _find_out(
    shares: WorkPlan, findings: AnalysisState, digests: Mapping[str, str], keeper: _Keeper, *, progress: bool
) -> None:
    """Bounds and rows until the findings are complete."""

    def cost(info: UnitInfo) -> float:
        return info.cost(findings.wanted)

    # Counted by cost, not by tensors: the time left is then right though sizes differ by orders of magnitude.
    with tqdm(total=1, desc="analyze", unit="flop", unit_scale=True, delay=1, disable=not progress) as bar:
        try:
            while (step := findings.next_step(shares.ranks.size)).left:
                bar.total = bar.n + sum(cost(findings.infos[name]) for name in step.left)
                _bounds(shares, findings, step)
                scale = _whole_to_own(shares, step.exact, cost)

                rows = _Rows(shares, findings.wanted, digests)

                def note(unit: Unit, row: SpectralRow | None, scale: float = scale) -> None:
                    findings.add_row(unit.name, row)
                    bar.update(cost(findings.infos[unit.name]) * scale)
                    keeper.keep()

                for name, row in shares.map(step.exact, cost, rows.of, together=rows.together, done=note).items():
                    findings.add_row(name, row)
        finally:
            keeper.keep(now=True)


def _bounds(shares: WorkPlan, findings: AnalysisState, step: Step) -> None:
    found = shares.map(
        list(step.bounds),
        lambda info: info.num_parameters,
        lambda unit: lower_bound(unit, step.bounds[unit.name]),
    )
    for name, value in found.items():
        findings.add_bound(name, value, final=step.bounds[name] == LAST_STEPS)


def _whole_to_own(shares: WorkPlan, names: Sequence[str], cost: Callable[[UnitInfo], float]) -> float:
    """Cost of the named units over that of this rank's share of them: one rank's progress stands for all."""
    _, owner = shares.assign(names, cost)
    own = sum(cost(shares.infos[name]) for name in names if owner[name] == shares.ranks.rank)
    return sum(cost(shares.infos[name]) for name in names) / own if own else 0.0


@dataclass(frozen=True)
class _Rows:
    """Measures units whose values are in memory."""

    shares: WorkPlan
    wanted: MeasureSpec
    digests: Mapping[str, str]

    def of(self, unit: Unit) -> SpectralRow | None:
        return self._unchanged(unit, measure(unit, self.wanted, self._known_digest(unit)))

    def together(self, units: Sequence[Unit]) -> list[SpectralRow | None]:
        rows = measure_together(units, self.wanted, [self._known_digest(unit) for unit in units])
        return [self._unchanged(unit, row) for unit, row in zip(units, rows, strict=True)]

    def _known_digest(self, unit: Unit) -> str | None:
        return self.digests.get(unit.name) if self.shares.units[unit.name].deferred is None else None

    def _unchanged(self, unit: Unit, row: SpectralRow | None) -> SpectralRow | None:
        """The row; what was read a second time must be what was looked up in the cache."""
        if row is not None and self.digests.get(unit.name, row.digest) != row.digest:
            raise ValueError(
                f"{unit.name} has changed since this analysis began: analyze again once nothing writes to it"
            )
        return row


def _not_requested(infos: Mapping[str, UnitInfo], asked: Collection[str]) -> list[SkippedWeight]:
    return [
        SkippedWeight(name, info.shape, SkipReason.NOT_REQUESTED) for name, info in infos.items() if name not in asked
    ]


def _nothing_to_analyze(label: str, skipped: Sequence[SkippedWeight]) -> str:
    counts = {reason: sum(skip.reason is reason for skip in skipped) for reason in SkipReason}
    told = ", ".join(f"{count} {reason.value}" for reason, count in counts.items() if count) or "no parameters"
    way_out = " Load the weights first." if counts[SkipReason.META_DEVICE] else ""
    return f"nothing to analyze in {label}: {told}.{way_out}"
