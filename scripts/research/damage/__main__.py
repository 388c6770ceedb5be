"""Does a tensor's score predict the damage that training it does? One tensor at a time, at equal norm and gain.

python -m scripts.data.get_german
python -m scripts.research.damage run configs/damage/german.yaml      # resumable; start it once a core
python -m scripts.research.damage report                             # tables and figure, from the JSONL alone
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
_Results = Annotated[Path, typer.Option(help="The JSONL.")]
RESULTS = Path("docs/results/damage/smollm2_german.jsonl")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A study's YAML with a text section: configs/damage/german.yaml.")],
    results: _Results = RESULTS,
    workspace: Annotated[Path, typer.Option(help="Directions and locks; may be deleted.")] = Path("runs/damage"),
    only: Annotated[list[str] | None, typer.Option(help="Only this tensor (may be given several times).")] = None,
    relative_norm: Annotated[float, typer.Option(help="‖ΔW‖/‖W‖ of every tensor's first point.")] = 0.01,
    equal_gain: Annotated[float, typer.Option(help="Nats a token that the second point aims at.")] = 0.01,
) -> None:
    """Measures the tensors that are not done yet."""
    from scripts.research.config import load_study
    from scripts.research.damage.run import (  # torch and transformers: slow to import, not for the report
        Protocol,
        run_experiment,
    )

    protocol = Protocol(relative_norm=relative_norm, equal_gain=equal_gain)
    done = run_experiment(load_study(config), protocol, results, workspace, only=only)
    typer.echo(f"{done} tensors measured")


@app.command()
def report(results: _Results = RESULTS) -> None:
    """Writes the tables (.md) and the figure (.png) next to the JSONL."""
    from scripts.research.damage.report import write_report

    for path in write_report(results):
        typer.echo(path)


if __name__ == "__main__":
    app()
