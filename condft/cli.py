"""The command line: `condft analyze | train | evaluate`. Nothing imports it but scripts/train.py.

Heavy imports stand inside the commands, so that `condft --help` answers at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condft.console import console

if TYPE_CHECKING:
    from condft.report import SpectralReport

__all__ = ["app", "train_command"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train only the weights of low condition number, and see what was learned and what was forgotten.",
)

# Options that more than one command has.
Overrides = Annotated[list[str] | None, typer.Argument(help="Such as training.steps=10.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in output_dir first.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and report unusable clips.")]
StayOnCpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]

# What a user can mend. Anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, ConnectionError)


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="Checkpoint folder (config.json and safetensors) or hub id.")],
    json: Annotated[Path | None, typer.Option(help="Write the spectral report there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw κ by depth and module type (.png, .svg, .pdf).")] = None,
    measures: Annotated[str, typer.Option(help="basic, or all: log-volume and entropy deficit too.")] = "basic",
    lowest: Annotated[int, typer.Option(help="How many units of lowest κ to list.", min=0)] = 10,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow a checkpoint's own code.")] = False,
) -> None:
    """Spectral facts of every weight tensor of a checkpoint."""
    from condft.analysis import analyze as analyze_model

    with _UserErrors():
        if measures not in ("basic", "all"):
            raise ValueError(f"--measures is {measures!r}: choose basic or all")
        report = analyze_model(
            model, measures="all" if measures == "all" else "basic", trust_remote_code=trust_remote_code
        )
        _print_report(report, lowest)
        if json is not None:
            report.save(json)
        if plot is not None:
            from condft.plots import plot_condition_numbers

            plot_condition_numbers(report, plot)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML of the run.")],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    skip_bad: SkipBad = False,
    cpu: StayOnCpu = False,
) -> None:
    """Run the recipe of a YAML in this process; for several processes: accelerate launch scripts/train.py."""
    from condft.recipe import run
    from condft.training import load_config

    assignments = list(overrides or []) + (["data.skip_bad=true"] if skip_bad else [])
    with _UserErrors():
        run(load_config(config, assignments), resume=resume, overwrite=overwrite, cpu=cpu)


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="output_dir of a finished run.")],
    manifest: Annotated[Path | None, typer.Option(help="Other clips than the run's own test split.")] = None,
    split: Annotated[str, typer.Option(help="Split of that manifest.")] = "test",
    skip_bad: SkipBad = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    """Measure a finished run again: word error rate by language, and forgetting against its base."""
    from rich.table import Table

    from condft.files import write_json
    from condft.recipe import evaluate_run

    with _UserErrors():
        figures = evaluate_run(run_dir, manifest=manifest, split=split, skip_bad=skip_bad)
        table = Table(title=str(run_dir), title_justify="left", show_header=False)
        for name, value in figures.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        console().print(table)
        if json is not None:
            write_json(json, figures)


def train_command() -> None:
    """`scripts/train.py`: the train command with its config as `--config`, as accelerate's users expect."""

    def command(
        config: Annotated[Path, typer.Option(help="YAML of the run.")],
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        skip_bad: SkipBad = False,
        cpu: StayOnCpu = False,
    ) -> None:
        """One run of the recipe under accelerate."""
        train(config, overrides, resume=resume, overwrite=overwrite, skip_bad=skip_bad, cpu=cpu)

    typer.run(command)


class _UserErrors:
    """Turns errors that a user can mend into one message on stderr and exit code 1, without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, _USER_ERRORS):
            typer.secho(f"condft: {error}", err=True, fg=typer.colors.RED if sys.stderr.isatty() else None)
            raise typer.Exit(1) from error


def _print_report(report: "SpectralReport", lowest: int) -> None:
    """κ by module type, the units of lowest κ, and what was skipped."""
    from collections import Counter
    from statistics import median

    from rich.table import Table

    output = console()
    types = Table(title=f"{report.model}: κ by module type", title_justify="left")
    for heading in ("module type", "role", "units", "shape", "lowest κ", "median κ", "highest κ"):
        types.add_column(heading, justify="right" if "κ" in heading or heading == "units" else "left")
    for module_type in sorted({row.module_type for row in report.rows}):
        rows = [row for row in report.rows if row.module_type == module_type]
        values = [row.condition_number for row in rows]
        shapes = {"x".join(map(str, row.shape)) for row in rows}
        shape = shapes.pop() if len(shapes) == 1 else "several"
        summary = [f"{value:.4g}" for value in (min(values), median(values), max(values))]
        types.add_row(module_type, rows[0].role.value, str(len(rows)), shape, *summary)
    output.print(types)
    _print_ranking(report, lowest)
    reasons = Counter(skip.reason.value for skip in report.skipped)
    if reasons:
        output.print("skipped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())))


def _print_ranking(report: "SpectralReport", lowest: int) -> None:
    """The units of lowest κ across all types, and a warning where that is a ranking of shapes."""
    from rich.table import Table

    from condft.selection import select_units, shape_warning

    output = console()
    ranking = sorted(report.rows, key=lambda row: (row.condition_number, row.name))[:lowest]
    if not ranking:
        return
    table = Table(title=f"the {len(ranking)} of lowest κ", title_justify="left")
    for heading in ("unit", "κ", "σ max", "σ min", "stable rank", "entropy deficit (nats)"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for row in ranking:
        figures = (row.condition_number, row.sigma_max, row.sigma_min, row.stable_rank, row.entropy_deficit)
        table.add_row(row.name, *("not measured" if value is None else f"{value:.4g}" for value in figures))
    output.print(table)
    names = [row.name for row in report.rows]
    warning = shape_warning(select_units(report, num_tensors=len(ranking), stratify=None, candidates=names))
    if warning is not None:
        output.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
