"""`condft train`: the recipe of a YAML. `scripts/train.py` is the same command, for `accelerate launch`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from condft.cli.errors import UserErrors

__all__ = ["SkipBad", "train"]

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unusable clips out; count and report them.")]


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="YAML of the run (a file, or the name of a shipped one), and settings such as training.steps=10.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="The YAML, instead of as the first argument.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    skip_bad: SkipBad = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
) -> None:
    """Run the recipe of a YAML in this process; for several processes: accelerate launch scripts/train.py."""
    with UserErrors():
        from condft.recipe import run
        from condft.recipe.shipped import find_config
        from condft.training import load_config

        name, overrides = _config_and_overrides(settings or [], config)
        if skip_bad:
            overrides = [*overrides, "data.skip_bad=true"]
        run(load_config(find_config(name), overrides), resume=resume, overwrite=overwrite, cpu=cpu)


def _config_and_overrides(settings: Sequence[str], config: str | None) -> tuple[str, list[str]]:
    """Splits the arguments. The first one is the config if `--config` does not name it.

    Raises:
        ValueError: No config, or two.
    """
    if config is not None:
        second = [setting for setting in settings if "=" not in setting]
        if second:
            raise ValueError(
                f"two configurations: --config {config} and {second[0]}; settings have the form key=value"
            )
        return config, list(settings)
    # A file's name may hold "="; a setting is no file.
    if settings and ("=" not in settings[0] or Path(settings[0]).is_file()):
        return settings[0], list(settings[1:])
    from condft.recipe.shipped import shipped_configs

    raise ValueError(
        "no configuration: give the path of a YAML, or the name of a shipped one "
        f"({', '.join(shipped_configs())}), as the first argument or after --config"
    )
