"""`analyze`: weights -> spectra -> report, for a live model or a checkpoint that is never instantiated."""

import math
import platform
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from condft.digests import tensor_digest
from condft.report import ScreenedUnit, SkippedWeight, SkipReason, SpectralReport, SpectralRow
from condft.spectra import Measures, NonFiniteError, condition_number_bound, rounding_noise, spectral_facts
from condft.weights import Granularity, Unit, iter_checkpoint_units, iter_units, load_ahead

__all__ = ["NonFiniteWeightError", "analyze"]

# κ is asked for to 1e-3; a unit is ruled out only where its bound exceeds the threshold by more than both errors.
_RTOL = 1e-3
_MARGIN = 1.0 + 3 * _RTOL
_FIRST_STEPS, _LAST_STEPS = 6, 24


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
            "damaged or training diverged; the other weights' rows are in this error's `.report`."
        )
        self.names = names
        self.report = report


def analyze(
    model: nn.Module | str | Path,
    *,
    names: Collection[str] | None = None,
    granularity: Granularity = "tensor",
    measures: Measures = "basic",
    keep_lowest: int | None = None,
    stratify: Literal["module_type"] | None = None,
    spectrum: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> SpectralReport:
    """Spectral facts of every weight tensor of two or more dimensions.

    Args:
        model: A live model (also one with PEFT adapters: its base weights are analysed), or a checkpoint folder or
            hub id, whose weights are read one at a time without ever building the model.
        names: Only these units; all others are listed as not requested.
        granularity: "tensor", or "head": attention weights head by head (`condft.heads` says which and how named).
        measures: "basic": condition number, its two ends, Frobenius norm and stable rank. "all" adds log-volume and
            entropy deficit, which need a factorisation of every weight.
        keep_lowest: Figures for the units of lowest condition number only, at least that many (in each module type
            if `stratify`). The others are ruled out by a certified lower bound where a few products suffice, and
            listed in `screened`; the kept ones are those that a whole analysis would rank lowest.
        stratify: What `keep_lowest` counts within.
        spectrum: Keep all singular values of every unit too (an SVD each).
        progress: Show a progress bar on stderr, by cost.
        trust_remote_code: For a checkpoint folder whose architecture is not transformers' own.

    Returns:
        The report. The model is not modified, nor any random state.

    Raises:
        FileNotFoundError: A folder that is no checkpoint, or one whose files are missing.
        NonFiniteWeightError: Weights with NaN or infinity; the error carries the report of the rest.
        ValueError: Nothing to analyze (says what was skipped and why), a damaged checkpoint (names the file), or
            `keep_lowest` under 1.
    """
    if keep_lowest is not None and keep_lowest < 1:
        raise ValueError(f"keep_lowest={keep_lowest} keeps nothing: it must be at least 1")
    label = str(model) if isinstance(model, str | Path) else type(model).__name__
    if isinstance(model, nn.Module):
        items = iter_units(model, granularity=granularity)
    else:
        items = iter_checkpoint_units(model, granularity=granularity, trust_remote_code=trust_remote_code)
    units, skipped = _collect(items, names)
    if not units:
        raise ValueError(_nothing_to_analyze(label, skipped))
    # Counted by cost, not by tensors: the time left is then right though sizes differ by orders of magnitude.
    total = sum(map(_cost, units))
    with tqdm(total=total, desc="analyze", unit="flop", unit_scale=True, delay=1, disable=not progress) as bar:
        found = _Found(measures, spectrum, bar)
        if keep_lowest is None:
            for unit in load_ahead(units):
                found.measure(unit)
        else:
            _keep_lowest(found, units, keep_lowest, stratify)
    skipped += found.non_finite
    report = SpectralReport(tuple(found.rows), tuple(skipped), label, _versions(), measures, tuple(found.screened))
    if found.non_finite:
        raise NonFiniteWeightError([skip.name for skip in found.non_finite], report)
    return report


def _collect(
    items: Iterable[Unit | SkippedWeight], names: Collection[str] | None
) -> tuple[list[Unit], list[SkippedWeight]]:
    units: list[Unit] = []
    skipped: list[SkippedWeight] = []
    for item in items:
        if isinstance(item, SkippedWeight):
            skipped.append(item)
        elif names is not None and item.name not in names:
            skipped.append(SkippedWeight(item.name, tuple(item.tensor.shape), SkipReason.NOT_REQUESTED))
        else:
            units.append(item)
    return units, skipped


@dataclass
class _Found:
    """What an analysis has found so far; every unit ends in one of the three lists."""

    measures: Measures
    spectrum: bool
    bar: tqdm
    rows: list[SpectralRow] = field(default_factory=list)
    screened: list[ScreenedUnit] = field(default_factory=list)
    non_finite: list[SkippedWeight] = field(default_factory=list)

    def measure(self, unit: Unit) -> float | None:
        """Adds the unit's row and returns its condition number; None if it holds NaN or infinity."""
        self.bar.update(_cost(unit))
        try:
            row = _row(unit, self.measures, self.spectrum)
        except NonFiniteError:
            self.non_finite.append(SkippedWeight(unit.name, tuple(unit.tensor.shape), SkipReason.NON_FINITE))
            return None
        self.rows.append(row)
        return row.condition_number

    def bound(self, unit: Unit, *, steps: int, above: float = math.inf) -> float | None:
        """A certified lower bound of the unit's condition number; None if it holds NaN or infinity."""
        try:
            return condition_number_bound(unit.matrix, max_steps=steps, above=above)
        except NonFiniteError:
            self.bar.update(_cost(unit))
            self.non_finite.append(SkippedWeight(unit.name, tuple(unit.tensor.shape), SkipReason.NON_FINITE))
            return None

    def rule_out(self, unit: Unit, bound: float) -> None:
        self.bar.update(_cost(unit))
        shape = tuple(unit.tensor.shape)
        self.screened.append(ScreenedUnit(unit.name, shape, unit.tensor.numel(), unit.module_type, unit.role, bound))


def _keep_lowest(found: _Found, units: Sequence[Unit], keep: int, stratify: str | None) -> None:
    """Exact figures in the order of cheap bounds, until the next bound exceeds the keep-th lowest exact figure."""
    strata: dict[str, list[tuple[float, str, Unit]]] = defaultdict(list)
    for unit, loaded in zip(units, load_ahead(units), strict=True):
        bound = found.bound(loaded, steps=_FIRST_STEPS)
        if bound is not None:
            # Without its values, where those were read for this: they are read again for the few that need it.
            strata[unit.module_type if stratify else ""].append((bound, unit.name, unit))
    for members in strata.values():
        kept: list[float] = []
        for first, _, unit in sorted(members, key=lambda entry: entry[:2]):
            limit = sorted(kept)[keep - 1] * _MARGIN if len(kept) >= keep else math.inf
            if first > limit:
                found.rule_out(unit, first)
                continue
            loaded = unit.load()
            bound = first
            if limit < math.inf:
                bound = max(first, condition_number_bound(loaded.matrix, above=limit, max_steps=_LAST_STEPS))
            if bound > limit:
                found.rule_out(unit, bound)
            elif (exact := found.measure(loaded)) is not None:
                kept.append(exact)


def _row(unit: Unit, measures: Measures, spectrum: bool) -> SpectralRow:
    facts = spectral_facts(unit.matrix, measures=measures, rtol=_RTOL, spectrum=spectrum)
    matrix_shape = (unit.matrix.shape[0], unit.matrix.shape[1])
    precision = unit.tensor.dtype if unit.rounding_error is None else unit.rounding_error
    noise_floor = rounding_noise(matrix_shape, precision, facts.frobenius_norm)
    return SpectralRow(
        name=unit.name,
        shape=tuple(unit.tensor.shape),
        matrix_shape=matrix_shape,
        dtype=str(unit.tensor.dtype).removeprefix("torch."),
        num_parameters=unit.tensor.numel(),
        module_type=unit.module_type,
        role=unit.role,
        digest=tensor_digest(unit.tensor),
        noise_floor=noise_floor,
        resolved=facts.sigma_min > noise_floor,
        **vars(facts),
    )


def _cost(unit: Unit) -> int:
    """Flops, to first order: a square is factored; a rectangle is multiplied by some hundred vectors."""
    rows, columns = unit.matrix.shape
    return 2 * unit.matrix.numel() * (min(rows, columns) if rows == columns else 100)


def _nothing_to_analyze(label: str, skipped: list[SkippedWeight]) -> str:
    counts = {reason: sum(skip.reason is reason for skip in skipped) for reason in SkipReason}
    told = ", ".join(f"{count} {reason.value}" for reason, count in counts.items() if count) or "no parameters"
    way_out = " Load the weights first." if counts[SkipReason.META_DEVICE] else ""
    return f"nothing to analyze in {label}: {told}.{way_out}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}
