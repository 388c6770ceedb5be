"""The command line: `condft analyze | select | compare | plot | train | evaluate`. Only scripts/train.py imports it.

Heavy imports stand inside the commands, so that `condft --help` answers at once.
"""

import typer

from condft.cli.recipe import evaluate, train, train_command
from condft.cli.spectra import analyze, compare, plot
from condft.cli.units import select

__all__ = ["app", "train_command"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train only the weights of low condition number, and see what was learned and what was forgotten.",
)
for command in (analyze, select, compare, plot, train, evaluate):
    app.command()(command)
