"""`condft analyze`, `condft compare` and `condft plot`: reports made, laid beside each other, and drawn."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from condft.cli.errors import UserErrors
from condft.cli.pictures import checked_picture

if TYPE_CHECKING:
    from condft.report import SpectralReport

__all__ = ["analyze", "compare", "plot"]

Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a checkpoint's own code.")]

NoCache = Annotated[bool, typer.Option("--no-cache", help="Analyze anew; neither read nor write the user's cache.")]


def analyze(
    model: Annotated[str, typer.Argument(help="Checkpoint folder (config.json and safetensors) or hub id.")],
    json: Annotated[Path | None, typer.Option(help="Write the spectral report there.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line a unit there, all figures but the spectra.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw κ by depth and module type (.png, .svg, .pdf).", callback=checked_picture),
    ] = None,
    measures: Annotated[
        Literal["basic", "all"], typer.Option(help="all: log-volume and entropy deficit too.")
    ] = "basic",
    granularity: Annotated[Literal["tensor", "head"], typer.Option(help="head: attention head by head.")] = "tensor",
    keep_lowest: Annotated[
        int | None, typer.Option(help="Figures for that many units of lowest κ only; rule the others out.")
    ] = None,
    stratify: Annotated[
        Literal["module_type", "none"], typer.Option(help="What --keep-lowest counts within.")
    ] = "none",
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Keep all singular values in the report.")] = False,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Fisher information too: loads the model, which writes a text of its own.")
    ] = False,
    lowest: Annotated[int, typer.Option(help="How many units of lowest κ to list.", min=0)] = 10,
    no_cache: NoCache = False,
    trust_remote_code: Remote = False,
) -> None:
    """Spectral facts of every weight tensor of a checkpoint."""
    from condft.analysis.analyze import NonFiniteWeightError
    from condft.analysis.analyze import analyze as analyze_model
    from condft.cli.tables import print_report

    with UserErrors():
        if stratify != "none" and keep_lowest is None:
            raise ValueError("--stratify says what --keep-lowest counts within: give --keep-lowest too")
        damage: NonFiniteWeightError | None = None
        try:
            report = analyze_model(
                model,
                granularity=granularity,
                measures=measures,
                keep_lowest=keep_lowest,
                stratify=None if stratify == "none" else stratify,
                spectrum=spectrum,
                cache=not no_cache,
                trust_remote_code=trust_remote_code,
            )
        except NonFiniteWeightError as error:
            if not error.report.rows:
                raise
            report, damage = error.report, error  # told at the end: what was found is printed and written all the same
        if fisher and damage is None:  # a damaged model writes no text to measure by
            report = _with_fisher_information(report, model, trust_remote_code=trust_remote_code)
        if json is not None:
            report.save(json)
        if csv is not None:
            from condft.cli.exports import write_rows

            write_rows(report, csv)
        if plot is not None:
            from condft.plots import plot_condition_numbers

            plot_condition_numbers(report, plot)
        print_report(report, lowest)
        if damage is not None:
            raise damage


def _with_fisher_information(report: "SpectralReport", model: str, *, trust_remote_code: bool) -> "SpectralReport":
    from transformers import AutoModelForCausalLM

    from condft.tuner import add_fisher_information

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=trust_remote_code)
    return add_fisher_information(report, loaded)


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
    """How spectra moved from A to B: base and tuned, bf16 and 4-bit; and how much of a selection stays."""
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


def plot(
    report: Annotated[Path, typer.Argument(help="Report of condft analyze --json.")],
    picture: Annotated[Path, typer.Argument(help="File to draw into (.png, .svg, .pdf).", callback=checked_picture)],
    spectra: Annotated[
        list[str] | None,
        typer.Option(help="Draw the singular values of these units instead (name or pattern such as '*.3.*')."),
    ] = None,
) -> None:
    """Draw a report: κ by depth and module type, or with --spectra the singular values of chosen units."""
    from condft.plots import plot_condition_numbers, plot_spectra
    from condft.report import SpectralReport

    with UserErrors():
        found = SpectralReport.load(report)
        if spectra:
            plot_spectra(found, _matching(found, spectra), picture)
        else:
            plot_condition_numbers(found, picture)


def _report_of(source: str, *, cache: bool, trust_remote_code: bool) -> "SpectralReport":
    if Path(source).is_file():
        from condft.report import SpectralReport

        return SpectralReport.load(source)
    from condft.analysis.analyze import analyze as analyze_model

    return analyze_model(source, cache=cache, trust_remote_code=trust_remote_code)


def _matching(report: "SpectralReport", patterns: list[str]) -> list[str]:
    """Names that equal a pattern or match it; equality first, since `[17]` in a name is no character class."""
    names = [row.name for row in report.rows]
    chosen: list[str] = []
    for pattern in patterns:
        found = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"--spectra {pattern!r} matches none of the report's {len(names)} units")
        chosen += found
    return sorted(set(chosen))
