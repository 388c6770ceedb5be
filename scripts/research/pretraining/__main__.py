"""Pre-trains a small MoE from scratch and follows every weight's κ; then reports how much of κ was learned.

python -m scripts.research.pretraining train configs/pretraining/moe.yaml
python -m scripts.research.pretraining report configs/pretraining/moe.yaml
"""

from pathlib import Path
from typing import Annotated

import typer

from scripts.research.pretraining.run import Pretraining, load_config, points_of

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
_Config = Annotated[Path, typer.Argument(help="A YAML of configs/pretraining/.")]


@app.command()
def train(
    config: _Config, seed: Annotated[int | None, typer.Option(help="Replaces the YAML's: another base.")] = None
) -> None:
    """Trains, measures at the points and saves the checkpoint. Start it again to go on after an interruption."""
    settings = load_config(config, seed=seed)
    Pretraining(settings).run()
    typer.echo(settings.output)


@app.command()
def report(config: _Config) -> None:
    """Makes tables and figures from the JSONL alone."""
    from scripts.research.pretraining.report import (
        write_report,  # matplotlib: slow to import, and for this command only
    )

    settings = load_config(config)
    for path in write_report(points_of(settings), Path(settings.results)):
        typer.echo(path)


if __name__ == "__main__":
    app()
