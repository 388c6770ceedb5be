"""`condft plot`: pictures of a saved report."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condft.cli.errors import UserErrors, checked_picture

if TYPE_CHECKING:
    from condft.report import SpectralReport

__all__ = ["plot"]


def plot(
    report: Annotated[Path, typer.Argument(help="Report of condft analyze --json.")],
    picture: Annotated[Path, typer.Argument(help="File to draw into (.png, .svg, .pdf).", callback=checked_picture)],
    spectra: Annotated[
        list[str] | None,
        typer.Option(help="Draw the singular values of these units instead (name or pattern such as '*.3.*')."),
    ] = None,
) -> None:
    """Draw a report: κ by depth and module type, or with --spectra the singular values of chosen units."""
    with UserErrors():
        from condft.plots import plot_condition_numbers, plot_spectra
        from condft.report import SpectralReport

        found = SpectralReport.load(report)
        if spectra:
            plot_spectra(found, _matching(found, spectra), picture)
        else:
            plot_condition_numbers(found, picture)


def _matching(report: "SpectralReport", patterns: list[str]) -> list[str]:
    """Names that equal a pattern or match it.

    Equality first: to fnmatch, `[17]` in a unit's name is a character class, and the name would not match itself.
    """
    names = [row.name for row in report.rows]
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"--spectra {pattern!r} matches none of the report's {len(names)} units")
        chosen += found
    return sorted(set(chosen))
