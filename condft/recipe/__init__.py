"""The cross-modal recipe, end to end; see `condft.recipe.run`."""

from condft.recipe.load import evaluate_run, load_run
from condft.recipe.run import run

__all__ = ["evaluate_run", "load_run", "run"]
