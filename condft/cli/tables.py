"""Tables: reports, selections, comparisons, and figures by name."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

from rich.table import Table

from condft.report import SpectralReport, SpectralRow
from condft.runtime.console import console
from condft.selection.compare import ReportComparison, SpectralShift
from condft.selection.select import Selection, select_units, shape_warning

__all__ = ["print_comparison", "print_figures", "print_report", "print_selection"]


def print_report(report: SpectralReport, lowest: int) -> None:
    """Prints κ by module type, the units of lowest κ, what was ruled out and what was skipped."""
    types = _table(f"{report.model}: κ by module type", ["module type", "role", "shape"])
    for heading in ("units", "lowest κ", "median κ", "highest κ"):
        types.add_column(heading, justify="right")
    for module_type in sorted({row.module_type for row in report.rows}):
        rows = sorted((r for r in report.rows if r.module_type == module_type), key=lambda r: r.condition_number)
        shapes = {"x".join(map(str, row.shape)) for row in rows}
        shape = shapes.pop() if len(shapes) == 1 else "several"
        # The low median is a row, not a mean of two, so it has marks as the others have.
        middle = median_low(range(len(rows)))
        kappas = (_kappa(rows[index]) for index in (0, middle, -1))
        types.add_row(module_type, rows[0].role.value, shape, str(len(rows)), *kappas)
    output = console()
    output.print(types)
    _print_ranking(report, lowest)
    _print_marks(report.rows)
    if report.screened:
        bound = min(unit.condition_number_bound for unit in report.screened)
        output.print(f"ruled out without exact figures: {len(report.screened)} units, κ at least {bound:.4g}")
    reasons = Counter(skip.reason.value for skip in report.skipped)
    if reasons:
        output.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())))


def print_selection(selection: Selection, report: SpectralReport) -> None:
    """Prints the chosen units of each module type, their share of the parameters, and the shape warning."""
    table = _table(f"{report.model}: chosen by {selection.score}", ["module type"])
    for heading in ("chosen", "of"):
        table.add_column(heading, justify="right")
    for module_type, (chosen, candidates) in selection.by_module_type.items():
        table.add_row(module_type, str(chosen), str(candidates))
    output = console()
    output.print(table)
    share = selection.num_parameters / selection.candidate_parameters
    output.print(
        f"{len(selection.names)} of {selection.num_candidates} units, {selection.num_parameters:,} of "
        f"{selection.candidate_parameters:,} parameters ({share:.1%})",
        highlight=False,
    )
    _print_warning(shape_warning(selection))


def print_comparison(comparison: ReportComparison) -> None:
    """Prints median changes and rank correlations by module type, the overlap of selections, and unmatched units."""
    table = _table(f"{comparison.model_a} -> {comparison.model_b}: median change", ["module type"])
    for heading in ("units", "changed", "κ", "σ max", "σ min", "Frobenius", "Spearman", "Kendall"):
        table.add_column(heading, justify="right")
    for module_type, shift in comparison.by_module_type.items():
        table.add_row(module_type, *_shift_cells(shift))
    table.add_section()
    table.add_row("all", *_shift_cells(comparison.overall))
    output = console()
    output.print(table)
    lost, gained = comparison.overall.rank_lost, comparison.overall.rank_gained
    if lost or gained:
        output.print(f"rank-deficient in the second alone: {lost} units; in the first alone: {gained}")
    kept = _table(f"how many of the lowest κ stay, of {comparison.num_candidates} units", [])
    for heading in ("lowest", "stay, across types", "stay, within each type"):
        kept.add_column(heading, justify="right")
    for entry in comparison.kept:
        kept.add_row(str(entry.count), str(entry.across), str(entry.within))
    if comparison.kept:
        output.print(kept)
    for names, where in (
        (comparison.only_in_a, "only in the first"),
        (comparison.only_in_b, "only in the second"),
        (comparison.other_shape, "of another shape, not compared"),
    ):
        if names:
            output.print(f"{where}: {len(names)} units, such as {names[0]}", highlight=False)


def print_figures(figures: Mapping[str, Any], *, title: str) -> None:
    """Prints one row for each figure."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console().print(table)


def _print_ranking(report: SpectralReport, lowest: int) -> None:
    """Prints the units of lowest κ across all types, and a warning where that is a ranking of shapes."""
    ranking = sorted(report.rows, key=lambda row: (row.condition_number, row.name))[:lowest]
    if not ranking:
        return
    table = _table(f"the {len(ranking)} of lowest κ", ["unit"])
    for heading in ("κ", "σ max", "σ min", "stable rank", "entropy deficit (nats)"):
        table.add_column(heading, justify="right")
    for row in ranking:
        figures = (row.sigma_max, row.sigma_min, row.stable_rank, row.entropy_deficit)
        cells = ("not measured" if value is None else f"{value:.4g}" for value in figures)
        table.add_row(row.name, _kappa(row), *cells)
    console().print(table)
    if not report.screened:  # the warning compares with all units, and those screened out have no figures
        names = [row.name for row in report.rows]
        chosen = select_units(report, num_tensors=len(ranking), stratify=None, candidates=names)
        _print_warning(shape_warning(chosen))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in columns:
        table.add_column(heading)
    return table


def _kappa(row: SpectralRow) -> str:
    """κ with its marks: `≥` for a lower bound, `*` where rounding of the stored weight hides sigma_min."""
    return "≥ " * row.is_lower_bound + f"{row.condition_number:.4g}" + " *" * (not row.resolved)


def _print_marks(rows: Sequence[SpectralRow]) -> None:
    bounds, unresolved = sum(row.is_lower_bound for row in rows), sum(not row.resolved for row in rows)
    if bounds:
        console().print(f"≥ the figure is a lower bound: κ of {bounds} units is past what the precision resolves")
    if unresolved:
        console().print(f"* σ min of {unresolved} units lies under the rounding of their storage dtype, and κ with it")


def _shift_cells(shift: SpectralShift) -> list[str]:
    # The changes are differences of logarithms; expm1 makes them relative changes.
    changes = (shift.condition_number, shift.sigma_max, shift.sigma_min, shift.frobenius_norm)
    return [
        str(shift.num_units),
        str(shift.num_changed),
        *("-" if value is None else f"{math.expm1(value):+.2%}" for value in changes),
        *("-" if value is None else f"{value:.3f}" for value in (shift.spearman, shift.kendall)),
    ]


def _print_warning(warning: str | None) -> None:
    if warning is not None:
        console().print(f"warning: {warning}", style="yellow", highlight=False)
