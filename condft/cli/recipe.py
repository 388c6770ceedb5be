"""`condft train` and `condft evaluate`: the recipe of a YAML, and a finished run measured again."""

from pathlib import Path
from typing import Annotated

import typer

from condft.cli.errors import UserErrors
from condft.runtime.console import console

__all__ = ["evaluate", "train", "train_command"]

Overrides = Annotated[list[str] | None, typer.Argument(help="Such as training.steps=10.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Put this run in place of the one in output_dir.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count and report unusable clips.")]
StayOnCpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]


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
    with UserErrors():
        run(load_config(config, assignments), resume=resume, overwrite=overwrite, cpu=cpu)


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="output_dir of a finished run.")],
    manifest: Annotated[Path | None, typer.Option(help="Other clips than the run's own test split.")] = None,
    split: Annotated[str, typer.Option(help="Split of that manifest.")] = "test",
    skip_bad: SkipBad = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    """Measure a finished run again: word error rate by language, and forgetting against its base."""
    from rich.table import Table

    from condft.files.atomic import write_json
    from condft.recipe import evaluate_run

    with UserErrors():
        figures = evaluate_run(run_dir, manifest=manifest, split=split, skip_bad=skip_bad)
        if json is not None:
            write_json(json, figures)
        table = Table(title=str(run_dir), title_justify="left", show_header=False)
        for name, value in figures.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        console().print(table)


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
