"""The study: which selection forgets least? Runs it (resumable, in an order that answers early), and reports it.

python -m scripts.research.study run configs/study/smallest.yaml
python -m scripts.research.study report configs/study/smallest.yaml
"""

from pathlib import Path
from typing import Annotated

import typer

from scripts.research.config import load_study
from scripts.research.study.results import Results
from scripts.research.study.run import run_study

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
_Study = Annotated[Path, typer.Argument(help="A YAML of configs/study/.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="A setting in place of the YAML's: section.key=value, several times.")
]


@app.command()
def run(
    config: _Study,
    only: Annotated[list[str] | None, typer.Option(help="Only this arm (may be given several times).")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Only this seed (may be given several times).")] = None,
    max_runs: Annotated[int | None, typer.Option(help="Stop after so many runs.")] = None,
    overrides: _Set = None,
) -> None:
    """Does the runs that are not done yet. Start it once a core: processes share the runs between them."""
    done = run_study(load_study(config, overrides or ()), only=only, seeds=seeds, max_runs=max_runs)
    typer.echo(f"{done} runs done")


@app.command()
def report(config: _Study, overrides: _Set = None) -> None:
    """Makes tables and figures from the JSONL alone."""
    from scripts.research.study.report import write_report  # matplotlib: slow to import, and for this command only

    study = load_study(config, overrides or ())
    for path in write_report(study, Results(study)):
        typer.echo(path)


if __name__ == "__main__":
    app()
