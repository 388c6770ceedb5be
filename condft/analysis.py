"""`analyze`: weights -> spectra -> report, for a live model or a checkpoint that is never instantiated."""

import platform
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from condft.report import SkippedWeight, SkipReason, SpectralReport, SpectralRow
from condft.spectra import spectral_facts
from condft.weights import Granularity, Unit, iter_checkpoint_units, iter_units, load_ahead, tensor_digest

__all__ = ["NonFiniteWeightError", "analyze"]

DIGEST_DIGITS = 16


class NonFiniteWeightError(ValueError):
    """Some weights hold NaN or infinity, so they have no spectrum.

    Attributes:
        names: All units concerned.
        report: The report of all the others.
    """

    def __init__(self, names: list[str], report: SpectralReport) -> None:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        super().__init__(
            f"NaN or infinity in {len(names)} of {len(names) + len(report.rows)} weights: {shown}. "
            "The checkpoint is damaged or training diverged; the other weights' rows are in this error's `.report`."
        )
        self.names = names
        self.report = report


def analyze(
    model: nn.Module | str | Path,
    *,
    names: Collection[str] | None = None,
    granularity: Granularity = "tensor",
    progress: bool = True,
    trust_remote_code: bool = False,
) -> SpectralReport:
    """Spectral facts of every weight tensor of two or more dimensions.

    Args:
        model: A live model (also one with PEFT adapters: its base weights are analysed), or a checkpoint folder or
            hub id, whose weights are read one at a time without ever building the model.
        names: Only these units; all others are listed as not requested.
        granularity: "tensor", or "head": attention weights head by head (`condft.heads` says which and how named).
        progress: Show a progress bar on stderr.
        trust_remote_code: For a checkpoint folder whose architecture is not transformers' own.

    Returns:
        The report; rows in fp64 whatever the storage dtype. The model is not modified.

    Raises:
        FileNotFoundError: A folder that is no checkpoint, or one whose files are missing.
        NonFiniteWeightError: Weights with NaN or infinity; the error carries the report of the rest.
        ValueError: Nothing to analyze (says what was skipped and why), or a damaged checkpoint (names the file).
    """
    label = str(model) if isinstance(model, str | Path) else type(model).__name__
    if isinstance(model, nn.Module):
        items = iter_units(model, granularity=granularity)
    else:
        items = iter_checkpoint_units(model, granularity=granularity, trust_remote_code=trust_remote_code)
    units: list[Unit] = []
    skipped: list[SkippedWeight] = []
    for item in items:
        if isinstance(item, SkippedWeight):
            skipped.append(item)
        elif names is not None and item.name not in names:
            skipped.append(SkippedWeight(item.name, tuple(item.tensor.shape), SkipReason.NOT_REQUESTED))
        else:
            units.append(item)
    if not units:
        raise ValueError(_nothing_to_analyze(label, skipped))
    rows, non_finite = _rows(units, progress)
    report = SpectralReport(tuple(rows), (*skipped, *non_finite), label, _versions())
    if non_finite:
        raise NonFiniteWeightError([skip.name for skip in non_finite], report)
    return report


def _rows(units: list[Unit], progress: bool) -> tuple[list[SpectralRow], list[SkippedWeight]]:
    rows: list[SpectralRow] = []
    non_finite: list[SkippedWeight] = []
    total = sum(map(_cost, units))
    # Counted by cost, not by tensors: the time left is then right though sizes differ by orders of magnitude.
    with tqdm(total=total, desc="analyze", unit="flop", unit_scale=True, delay=1, disable=not progress) as bar:
        for unit in load_ahead(units):
            if torch.isfinite(unit.tensor).all():
                rows.append(_row(unit))
            else:
                non_finite.append(SkippedWeight(unit.name, tuple(unit.tensor.shape), SkipReason.NON_FINITE))
            bar.update(_cost(unit))
    return rows, non_finite


def _row(unit: Unit) -> SpectralRow:
    facts = spectral_facts(unit.matrix)
    return SpectralRow(
        name=unit.name,
        shape=tuple(unit.tensor.shape),
        dtype=str(unit.tensor.dtype).removeprefix("torch."),
        num_parameters=unit.tensor.numel(),
        module_type=unit.module_type,
        role=unit.role,
        digest=tensor_digest(unit.tensor)[:DIGEST_DIGITS],
        **vars(facts),
    )


def _cost(unit: Unit) -> int:
    """Flops of reducing an m x n matrix to bidiagonal form, to first order (Golub & Van Loan, §8.6)."""
    return 4 * unit.matrix.numel() * min(unit.matrix.shape)


def _nothing_to_analyze(label: str, skipped: list[SkippedWeight]) -> str:
    counts = {reason: sum(skip.reason is reason for skip in skipped) for reason in SkipReason}
    told = ", ".join(f"{count} {reason.value}" for reason, count in counts.items() if count) or "no parameters"
    way_out = " Load the weights first." if counts[SkipReason.META_DEVICE] else ""
    return f"nothing to analyze in {label}: {told}.{way_out}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}
