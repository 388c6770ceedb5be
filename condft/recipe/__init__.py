"""The recipe: a text LLM learns to transcribe speech, in one call from a configuration to a folder of results."""

from condft.runtime.extras import needs_extra

with needs_extra("recipe", "speech"):
    from condft.recipe.load import evaluate_run, load_run
    from condft.recipe.run import run
    from condft.recipe.shipped import find_config, shipped_configs

__all__ = ["evaluate_run", "find_config", "load_run", "run", "shipped_configs"]
