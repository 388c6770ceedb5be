"""`condft analyze`: the spectral facts of a checkpoint, as tables and files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from condft.cli.errors import UserErrors, checked_picture

if TYPE_CHECKING:
    from condft.report import SpectralReport

__all__ = ["NoCache", "Remote", "analyze"]

Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a checkpoint's own code.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Analyze again; neither read nor write the user's cache.")]


def analyze(
    model: Annotated[str, typer.Argument(help="Checkpoint folder (config.json and safetensors) or hub id.")],
    json: Annotated[Path | None, typer.Option(help="Write the spectral report there.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write one line a unit there, all figures except the spectra.")
    ] = None,
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
        bool,
        typer.Option("--fisher", help="Fisher information too: loads the model and samples text from it."),
    ] = False,
    lowest: Annotated[int, typer.Option(help="How many units of lowest κ to list.", min=0)] = 10,
    no_cache: NoCache = False,
    trust_remote_code: Remote = False,
) -> None:
    """Spectral facts of every weight of a checkpoint."""
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
            # Without any row there is nothing to print or write.
            if not error.report.rows:
                raise
            # Raised again at the end: the figures of the other weights are printed and written all the same.
            report, damage = error.report, error
        if fisher and damage is None:  # a damaged model cannot sample text
            report = _with_fisher_information(report, model, trust_remote_code=trust_remote_code)
        _write(report, json=json, csv=csv, plot=plot)  # before printing: a closed pipe must not cost the report
        print_report(report, lowest)
        if damage is not None:
            raise damage


def _with_fisher_information(report: "SpectralReport", model: str, *, trust_remote_code: bool) -> "SpectralReport":
    from transformers import AutoModelForCausalLM

    from condft.tuner import add_fisher_information

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=trust_remote_code)
    return add_fisher_information(report, loaded)


def _write(report: "SpectralReport", *, json: Path | None, csv: Path | None, plot: Path | None) -> None:
    if json is not None:
        report.save(json)
    if csv is not None:
        from condft.cli.exports import write_rows

        write_rows(report, csv)
    if plot is not None:
        from condft.plots import plot_condition_numbers

        plot_condition_numbers(report, plot)
