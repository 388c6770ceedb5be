"""How the spectra of two reports differ, such as those of a base and a tuned model, or of bf16 and 4-bit weights."""

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from condft.report import SpectralReport, SpectralRow
from condft.selection.select import CANDIDATE_ROLES, Stratify, select_units

__all__ = ["Kept", "ReportComparison", "SpectralShift", "compare_reports", "kendall_tau", "spearman_rho"]

_DEFAULT_COUNTS = (10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class SpectralShift:
    """How the spectra of a group of units differ between report A and report B.

    Each of the four changes is the median over the group of log(B / A), in nats: 0.01 is one per cent. A unit where
    one of the two figures is zero or infinite has no such ratio and is left out; None if no unit is left.

    Attributes:
        num_units: Units of the group.
        num_changed: Units whose stored bytes differ.
        rank_lost: Units that are rank-deficient in B alone.
        rank_gained: Units that are rank-deficient in A alone.
        condition_number: Median change of the log of the condition number.
        sigma_max: The same of the largest singular value.
        sigma_min: The same of the smallest singular value.
        frobenius_norm: The same of the Frobenius norm.
        spearman: Rank correlation of κ in A with κ in B; None where it is undefined (one unit, or all tied).
        kendall: Kendall's tau-b of the same.
    """

    num_units: int
    num_changed: int
    rank_lost: int
    rank_gained: int
    condition_number: float | None
    sigma_max: float | None
    sigma_min: float | None
    frobenius_norm: float | None
    spearman: float | None
    kendall: float | None


@dataclass(frozen=True)
class Kept:
    """How many of the `count` units that `select_units` chooses from A it also chooses from B.

    Attributes:
        count: Size of both selections.
        across: Units in both selections when all units are ranked together.
        within: Units in both selections when each module type is ranked by itself (the default rule of CondFT).
    """

    count: int
    across: int
    within: int


@dataclass(frozen=True)
class ReportComparison:
    """What `compare_reports` found; A and B are its first and second argument.

    Attributes:
        model_a: `model` of report A.
        model_b: `model` of report B.
        overall: The shift of all units that both reports have.
        by_module_type: The shift of each module type, sorted by its name.
        kept: One entry per count, ascending.
        num_candidates: Number of units that `kept` chooses from: the layers and experts that both reports have, or
            all units if there is no layer and no expert.
        only_in_a: Names of the units that B lacks, sorted.
        only_in_b: Names of the units that A lacks, sorted.
        other_shape: Names of the units whose shape differs, sorted; they are compared nowhere.

    >>> comparison = compare_reports(report, report, counts=[5])
    >>> comparison.kept
    (Kept(count=5, across=5, within=5),)
    >>> comparison.only_in_b
    ()
    """

    model_a: str
    model_b: str
    overall: SpectralShift
    by_module_type: dict[str, SpectralShift]
    kept: tuple[Kept, ...]
    num_candidates: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_shape: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; no figure is infinite or NaN."""
        return {"format": "condft.ReportComparison", "version": 1, **asdict(self)}


def compare_reports(
    a: SpectralReport, b: SpectralReport, *, counts: Collection[int] = _DEFAULT_COUNTS
) -> ReportComparison:
    """Compares two reports unit by unit, by name.

    Args:
        a: The report to start from, such as that of a base model.
        b: The report to compare with it.
        counts: Sizes k of the selections of lowest κ to compare; those that exceed the candidates are left out.

    Returns:
        The comparison.

    Raises:
        ValueError: The reports have no unit in common, one of them was made with `keep_lowest` (so that it lacks
            units), or a count under 1.

    >>> import torch
    >>> from condft import analyze
    >>> with torch.no_grad():
    ...     _ = base.model.layers[0].self_attn.q_proj.weight.mul_(2)
    >>> comparison = compare_reports(report, analyze(base, progress=False))
    >>> comparison.overall.num_changed, comparison.overall.num_units
    (1, 29)
    >>> shift = comparison.by_module_type["model.layers.*.self_attn.q_proj"]
    >>> shift.spearman  # the condition number ignores scale
    1.0
    """
    if any(count < 1 for count in counts):
        raise ValueError(f"counts={sorted(counts)} holds one under 1: a selection has at least one unit")
    for label, report in (("A", a), ("B", b)):
        if report.screened:
            raise ValueError(
                f"report {label} ({report.model}) was made with keep_lowest and lacks {len(report.screened)} units: "
                "analyze without it"
            )
    rows_a, rows_b = ({row.name: row for row in report.rows} for report in (a, b))
    both = [name for name in rows_a if name in rows_b]
    pairs = [(rows_a[name], rows_b[name]) for name in both if rows_a[name].shape == rows_b[name].shape]
    if not pairs:
        raise ValueError(
            f"no unit of {a.model} ({len(rows_a)} units, such as {_first(rows_a)}) has its counterpart in {b.model} "
            f"({len(rows_b)} units, such as {_first(rows_b)}): compare models of one architecture"
        )
    by_type: dict[str, list[tuple[SpectralRow, SpectralRow]]] = defaultdict(list)
    for pair in pairs:
        by_type[pair[0].module_type].append(pair)
    candidates = _candidates(pairs)
    return ReportComparison(
        model_a=a.model,
        model_b=b.model,
        overall=_shift(pairs),
        by_module_type={name: _shift(members) for name, members in sorted(by_type.items())},
        # Fewer than all: a choice of every candidate is the same in both by definition.
        kept=tuple(_kept(a, b, candidates, count) for count in sorted(set(counts)) if count < len(candidates)),
        num_candidates=len(candidates),
        only_in_a=tuple(sorted(set(rows_a) - set(rows_b))),
        only_in_b=tuple(sorted(set(rows_b) - set(rows_a))),
        other_shape=tuple(sorted(name for name in both if rows_a[name].shape != rows_b[name].shape)),
    )


def spearman_rho(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank (Kendall 1948, chapter 3).

    Args:
        x: Numbers, infinities included.
        y: As many.

    Returns:
        A float in `[-1, 1]`; None where it is undefined: fewer than two pairs, or all of `x` or of `y` tied.

    Raises:
        ValueError: Different lengths.

    >>> spearman_rho([1.0, 2.0, 3.0], [10.0, 20.0, float("inf")])
    1.0
    """
    if not _can_be_ranked(x, y):
        return None
    from scipy import stats  # here, so that `import condft.selection` stays light

    return _within_one(stats.spearmanr(x, y).statistic)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    r"""Kendall's $\tau_b = (C - D) / \sqrt{(n_0 - n_1)(n_0 - n_2)}$ over pairs of pairs (Kendall 1945).

    C and D count concordant and discordant ones, $n_0 = n(n-1)/2$ all of them, $n_1$ and $n_2$ those tied in `x` and
    in `y`.

    Args:
        x: Numbers, infinities included.
        y: As many.

    Returns:
        A float in `[-1, 1]`; None where it is undefined: fewer than two pairs, or all of `x` or of `y` tied.

    Raises:
        ValueError: Different lengths.

    >>> kendall_tau([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    -1.0
    """
    if not _can_be_ranked(x, y):
        return None
    from scipy import stats

    return _within_one(stats.kendalltau(x, y).statistic)


def _can_be_ranked(x: Sequence[float], y: Sequence[float]) -> bool:
    if len(x) != len(y):
        raise ValueError(f"expected pairs, got {len(x)} and {len(y)} numbers")
    return len(set(x)) > 1 and len(set(y)) > 1


def _within_one(correlation: float) -> float:
    """Rounding may leave a perfect correlation at 1 + 2e-16."""
    return max(-1.0, min(1.0, float(correlation)))


def _shift(pairs: Sequence[tuple[SpectralRow, SpectralRow]]) -> SpectralShift:
    x = [before.condition_number for before, _ in pairs]
    y = [after.condition_number for _, after in pairs]
    return SpectralShift(
        num_units=len(pairs),
        num_changed=sum(before.digest != after.digest for before, after in pairs),
        # Finite before and infinite after.
        rank_lost=sum(before < after == math.inf for before, after in zip(x, y, strict=True)),
        rank_gained=sum(after < before == math.inf for before, after in zip(x, y, strict=True)),
        condition_number=_median_log_ratio(pairs, "condition_number"),
        sigma_max=_median_log_ratio(pairs, "sigma_max"),
        sigma_min=_median_log_ratio(pairs, "sigma_min"),
        frobenius_norm=_median_log_ratio(pairs, "frobenius_norm"),
        spearman=spearman_rho(x, y),
        kendall=kendall_tau(x, y),
    )


def _median_log_ratio(pairs: Iterable[tuple[SpectralRow, SpectralRow]], figure: str) -> float | None:
    values = [(getattr(before, figure), getattr(after, figure)) for before, after in pairs]
    # The chain means that both figures are positive and finite. A difference of logs: a quotient may overflow.
    ratios = [math.log(after) - math.log(before) for before, after in values if 0 < before < math.inf > after > 0]
    return statistics.median(ratios) if ratios else None


def _candidates(pairs: Iterable[tuple[SpectralRow, SpectralRow]]) -> list[str]:
    rows = [before for before, _ in pairs]
    return [row.name for row in rows if row.role in CANDIDATE_ROLES] or [row.name for row in rows]


def _kept(a: SpectralReport, b: SpectralReport, candidates: Sequence[str], count: int) -> Kept:
    def stay(stratify: Stratify | None) -> int:
        first, second = (
            select_units(report, num_tensors=count, stratify=stratify, candidates=candidates).names
            for report in (a, b)
        )
        return len(set(first) & set(second))

    return Kept(count, across=stay(None), within=stay("module_type"))


def _first(names: Iterable[str]) -> str:
    return min(names, default="none")
