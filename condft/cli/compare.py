"""`condft compare`: how the spectra of two checkpoints differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condft.cli.analyze import NoCache, Remote
from condft.cli.errors import UserErrors, checked_picture

if TYPE_CHECKING:
    from condft.report import SpectralReport

__all__ = ["compare"]


def compare(
    a: Annotated[str, typer.Argument(help="A report (.json), or a checkpoint folder or hub id, which is analyzed.")],
    b: Annotated[str, typer.Argument(help="What to compare with it.")],
    json: Annotated[Path | None, typer.Option(help="Write the comparison there.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw κ in B over κ in A (.png, .svg, .pdf).", callback=checked_picture)
    ] = None,
    no_cache: NoCache = False,
    trust_remote_code: Remote = False,
) -> None:
    """How spectra changed from A to B (base and tuned, bf16 and 4-bit), and how much of a selection is the same."""
    from condft.cli.tables import print_comparison
    from condft.files.atomic import write_json
    from condft.selection.compare import compare_reports

    with UserErrors():
        before, after = (
            _report_of(source, cache=not no_cache, trust_remote_code=trust_remote_code) for source in (a, b)
        )
        comparison = compare_reports(before, after)
        if json is not None:
            write_json(json, comparison.to_dict())
        if plot is not None:
            from condft.plots import plot_comparison

            plot_comparison(before, after, plot)
        print_comparison(comparison)


def _report_of(source: str, *, cache: bool, trust_remote_code: bool) -> "SpectralReport":
    """A saved report if `source` is a file; else a checkpoint's."""
    if Path(source).is_file():
        from condft.report import SpectralReport

        return SpectralReport.load(source)
    from condft.analysis.analyze import analyze as analyze_model

    return analyze_model(source, cache=cache, trust_remote_code=trust_remote_code)
