"""`condft evaluate`: a finished run, measured again."""

from pathlib import Path
from typing import Annotated

import typer

from condft.cli.errors import UserErrors
from condft.cli.train import SkipBad

__all__ = ["evaluate"]


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="output_dir of a finished run.")],
    manifest: Annotated[Path | None, typer.Option(help="Other clips than the run's own test split.")] = None,
    split: Annotated[str, typer.Option(help="Split of that manifest.")] = "test",
    skip_bad: SkipBad = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    """Measure a finished run again: word error rate by language, and forgetting against its base."""
    with UserErrors():
        from condft.cli.tables import print_figures
        from condft.files.atomic import write_json
        from condft.recipe import evaluate_run

        figures = evaluate_run(run_dir, manifest=manifest, split=split, skip_bad=skip_bad)
        if json is not None:
            write_json(json, figures)
        print_figures(figures, title=str(run_dir))
