"""`analyze`: weights -> spectra -> report, for a live model or for a checkpoint that is never instantiated.

The steps, each of which takes what the one before returned:

1. A checkpoint whose files have not changed: the report comes from the cache, and no file is opened.
2. `walk` finds the units, and `share_units` combines what all processes found into a plan.
3. The digests of the requested units are computed, and their rows are looked up in the cache by them.
4. `measure_missing` measures the rest; each unit is measured by one process.
5. The state of the analysis becomes the report.

`get_peft_model` has walked the model already, and starts with `analyze_units`, at step 3.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from condft.analysis.cache import Cache, CachedRows, open_cache
from condft.analysis.distributed import WorkPlan, share_units
from condft.analysis.index import FolderFingerprint, WeightIndex
from condft.analysis.measure import MeasureSpec, UnitInfo
from condft.analysis.missing import RowWriter, measure_missing
from condft.analysis.request import Request, not_requested, nothing_to_analyze
from condft.analysis.state import AnalysisState, current_versions
from condft.report import SkippedWeight, SpectralReport
from condft.runtime.process_group import ProcessGroup
from condft.selection.select import Stratify, check_stratify
from condft.spectra.routes import Measures, check_measures
from condft.weights.checkpoint import checkpoint_folder
from condft.weights.unit import Unit
from condft.weights.walk import Granularity, iter_checkpoint_units, iter_units

__all__ = ["NonFiniteWeightError", "analyze", "analyze_units"]


class NonFiniteWeightError(ValueError):
    """Some weights hold NaN or infinity, so they have no spectrum.

    Attributes:
        names: All units concerned.
        report: The report of all the others.

    >>> damaged = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> damaged[1].weight.data[0, 0] = float("nan")
    >>> try:
    ...     analyze(damaged)
    ... except NonFiniteWeightError as error:
    ...     print(error.names, [row.name for row in error.report.rows])
    ['1.weight'] ['0.weight']
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
        # An exception is pickled by its args, which are the message alone here; processes send errors to each other.
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
    """Measures every weight tensor of two or more dimensions: condition number, singular values at both ends, norms.

    >>> report = analyze(base, progress=False)
    >>> len(report.rows)
    29
    >>> row = report["model.layers.0.mlp.up_proj.weight"]
    >>> row.shape, row.dtype, round(row.sigma_max / row.sigma_min, 6) == round(row.condition_number, 6)
    ((64, 32), 'float32', True)

    The three units of lowest condition number, with their whole spectra; the other 26 are ruled out by bounds:

    >>> lowest = analyze(base, keep_lowest=3, spectrum=True, progress=False)
    >>> len(lowest.rows), len(lowest.rows[0].spectrum), len(lowest.screened)
    (3, 32, 26)

    A checkpoint is read one weight at a time, and no model is built:

    >>> base.save_pretrained("checkpoint")
    >>> analyze("checkpoint", progress=False).fingerprint == report.fingerprint
    True

    Args:
        model: A live model, or a checkpoint folder or hub id. Of a model with PEFT adapters, the base weights are
            analyzed. The weights of a checkpoint are read one at a time.
        names: Only these units. All others are listed as not requested.
        granularity: "tensor", or "head": attention weights head by head (see `condft.weights.heads`).
        measures: "basic": condition number, sigma_max, sigma_min, Frobenius norm and stable rank. "all" adds
            log-volume and entropy deficit, which need a factorization of every weight.
        keep_lowest: Rows for that many units of lowest condition number only (in each module type if `stratify` says
            so), ties by name. They are the units that a whole analysis would rank lowest. The others are listed in
            `screened`, with the highest condition number kept as their bound. Most of them are ruled out by a few
            products, without a factorization.
        stratify: What `keep_lowest` counts within: "module_type", or None for the whole model.
        spectrum: Keep all singular values of every unit too. That takes an SVD each.
        cache: Whether to use rows that were found before, and to store new ones, by the content of the weights.
            True for the user's cache (`$CONDFT_CACHE`, else `~/.cache/condft`; `CONDFT_CACHE=off` turns it off), or a
            folder. Rows that were found with more measures, or on another device, are used too: they agree to
            `relative_error`.
        shared: Under torch.distributed, whether the processes share the work. Then all of them must call this, and
            all get the whole report. False if one of them analyzes alone.
        progress: Show a progress bar on stderr, by cost (on the first process).
        trust_remote_code: For a checkpoint folder whose architecture is not transformers' own.

    Returns:
        The report. Neither the model nor any random state is changed.

    Raises:
        FileNotFoundError: A folder that is no checkpoint, or one whose files are missing.
        NonFiniteWeightError: Weights with NaN or infinity; the error carries the report of the rest.
        ValueError: Nothing to analyze (says what was skipped and why), a damaged checkpoint (names the file),
            processes that hold different models, `keep_lowest` under 1, names that the model lacks, or an unknown
            option.
    """
    check_measures(measures)
    check_stratify(stratify)
    # A string is a collection too, of its characters.
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string: give a collection such as {[names]}")
    if keep_lowest is not None and keep_lowest < 1:
        raise ValueError(f"keep_lowest={keep_lowest} keeps nothing: it must be at least 1")
    group = ProcessGroup(shared=shared)
    label = str(model) if isinstance(model, str | Path) else type(model).__name__
    chosen = None if names is None else frozenset(names)
    request = Request(label, MeasureSpec(measures, spectrum), chosen, keep_lowest, stratify)
    # The first process's arguments hold on all. Others may hold no weights, so they may not know the names.
    request, store = group.from_first(lambda: (request, open_cache(cache)))
    fingerprint = index = None
    if store is not None and not isinstance(model, nn.Module):
        # Taken before any file is read, so that a change during the walk shows. One process decides for all: two that
        # see different caches would part here, and one would wait for the other in the collectives below.
        fingerprint, index = group.from_first(lambda: _read_index(store, model, granularity, trust_remote_code))
        report = None if index is None else _report_from_cache(request, index, store, group)
        if report is not None:
            return report
    plan = share_units(walk(model, granularity, trust_remote_code=trust_remote_code), group)
    digests = None if index is None else index.digests
    return analyze_units(plan, request, store, progress=progress, fingerprint=fingerprint, digests=digests)


def walk(
    model: nn.Module | str | Path, granularity: Granularity, *, trust_remote_code: bool = False
) -> Iterator[Unit | SkippedWeight]:
    """The units of a live model or a checkpoint. Lazy: also a missing file is an error of the first `next`."""
    if isinstance(model, nn.Module):
        yield from iter_units(model, granularity=granularity)
    else:
        yield from iter_checkpoint_units(model, granularity=granularity, trust_remote_code=trust_remote_code)


def analyze_units(
    plan: WorkPlan,
    request: Request,
    cache: Cache | None,
    *,
    progress: bool = True,
    fingerprint: FolderFingerprint | None = None,
    digests: Mapping[str, str] | None = None,
) -> SpectralReport:
    """The report of units that a walk has found. All processes of the plan call this together.

    Args:
        plan: From `share_units`.
        request: The same on every process.
        cache: None for none. Only the first process uses it.
        progress: Show a progress bar (on the first process).
        fingerprint: Of the checkpoint folder, if the units come from one.
        digests: Name -> digest, as far as they are known, of a folder with this fingerprint.

    Raises:
        NonFiniteWeightError: As `analyze`.
        ValueError: Nothing to analyze, or names that the model lacks.
    """
    requested = request.select(plan.infos, plan.skipped)
    skipped = [*plan.skipped, *not_requested(plan.infos, requested)]
    if not requested:
        raise ValueError(nothing_to_analyze(request.label, skipped))
    if cache is None:
        # Nothing is looked up, so no digest is needed before the measuring: each weight is read once.
        known_digests: dict[str, str] = {}
        state = request.new_state(requested)
    else:
        known_digests = _digests(plan, requested, digests or {})
        if fingerprint is not None and plan.group.first:
            # Before the measuring: after an interruption, unchanged files need not be hashed again.
            index = WeightIndex(tuple(plan.infos.values()), tuple(plan.skipped), known_digests)
            cache.write_index(fingerprint, index)
        state = _look_up(request, plan.infos, known_digests, cache, plan.group)
    if not state.complete():
        # Rows will be added, so the cached rows' versions are not those of the whole.
        state.versions = current_versions()
        writer = RowWriter(cache if plan.group.first else None, plan, known_digests, state, request.label, skipped)
        measure_missing(plan, state, known_digests, writer, progress=progress and plan.group.first)
    report = state.report(request.label, skipped)
    if state.non_finite:
        # Last, so that all other rows are measured, stored and in the error's report.
        raise NonFiniteWeightError(sorted(state.non_finite), report)
    return report


def _read_index(
    cache: Cache, path: str | Path, granularity: str, trust_remote_code: bool
) -> tuple[FolderFingerprint, WeightIndex | None]:
    """The fingerprint of a checkpoint folder now, and its index in the cache if that is of the same files."""
    folder = checkpoint_folder(path, trust_remote_code=trust_remote_code)
    fingerprint = FolderFingerprint.of(folder, granularity, trust_remote_code=trust_remote_code)
    return fingerprint, cache.read_index(fingerprint)


def _report_from_cache(
    request: Request, index: WeightIndex, cache: Cache, group: ProcessGroup
) -> SpectralReport | None:
    """The report of a checkpoint whose files have not changed, if the cache holds all of it."""
    infos = {info.name: info for info in index.units}
    requested = request.select(infos, index.skipped)
    if not requested or not index.digests.keys() >= requested.keys():
        return None
    state = _look_up(request, infos, {name: index.digests[name] for name in requested}, cache, group)
    if not state.complete():
        return None
    return state.report(request.label, [*index.skipped, *not_requested(infos, requested)])


def _digests(plan: WorkPlan, requested: Mapping[str, UnitInfo], known: Mapping[str, str]) -> dict[str, str]:
    """Name -> digest of the requested units; hashed if they are not all known."""
    digests = known if known.keys() >= requested.keys() else plan.digests(list(requested))
    return {name: digests[name] for name in requested}


def _look_up(
    request: Request, infos: Mapping[str, UnitInfo], digests: Mapping[str, str], cache: Cache, group: ProcessGroup
) -> AnalysisState:
    """The state with what the cache knows about the units that have a digest, on every process."""
    requested = {name: infos[name] for name in digests}

    def rows() -> CachedRows:
        cached = CachedRows()
        for cached in cache.iter_rows(infos, digests):
            if request.new_state(requested, cached).complete():
                break
        return cached

    return request.new_state(requested, group.from_first(rows))
