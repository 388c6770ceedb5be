"""The application: every command, registered."""

import typer

from condft.cli.analyze import analyze
from condft.cli.compare import compare
from condft.cli.evaluate import evaluate
from condft.cli.plot import plot
from condft.cli.select import select
from condft.cli.train import train

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train only the weights of low condition number, and see what was learned and what was forgotten.",
)
for command in (analyze, select, compare, plot, train, evaluate):
    app.command()(command)
