"""The page of the command line, from the signatures of its commands."""

import inspect
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from condft.cli.app import app
from scripts.docs.markdown import GENERATED, prose_of, table

__all__ = ["command_line_page", "commands", "parameters"]

_INTRO = """`condft` has one command for each step. `condft COMMAND --help` prints the same.

A mistake that you can correct is one line on stderr and exit code 1. Where weights hold NaN, `analyze` writes the rows
of the others and also ends with 1.
[Command line](../how-to/command-line.md) shows the commands at work.

`scripts/train.py` takes the arguments of `condft train`, and is what `accelerate launch` starts."""


def commands() -> dict[str, Callable[..., Any]]:
    """Name -> function of every command."""
    found = [command.callback for command in app.registered_commands if command.callback is not None]
    return {function.__name__.replace("_", "-"): function for function in found}


def parameters(command: Callable[..., Any]) -> list[list[str]]:
    """Name, default and help of every argument and option of a command."""
    hints = get_type_hints(command, include_extras=True)
    return [
        [_name_of(parameter.name, hints[parameter.name]), _default_of(parameter), _help_of(hints[parameter.name])]
        for parameter in inspect.signature(command).parameters.values()
    ]


def command_line_page() -> str:
    """Every command with its arguments and options."""
    parts = ["# Command line", GENERATED, _INTRO]
    for name, command in commands().items():
        parts += [f"## condft {name}", prose_of(command.__doc__)]
        parts.append(table(["argument or option", "default", "meaning"], parameters(command)))
    return "\n\n".join(parts) + "\n"


def _info_of(hint: Any) -> ArgumentInfo | OptionInfo:
    (info,) = (entry for entry in hint.__metadata__ if isinstance(entry, ArgumentInfo | OptionInfo))
    return info


def _name_of(name: str, hint: Any) -> str:
    info = _info_of(hint)
    if isinstance(info, ArgumentInfo):
        return f"`{name.upper()}`"
    return ", ".join(f"`{option}`" for option in info.param_decls or [f"--{name.replace('_', '-')}"])


def _default_of(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    return "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"


def _help_of(hint: Any) -> str:
    named = ", ".join(f"`{choice}`" for choice in _choices(hint))
    return f"{_info_of(hint).help or ''}" + (f" One of {named}." if named else "")


def _choices(hint: Any) -> tuple[str, ...]:
    """The values that a Literal or an Enum allows, also within a list or next to None."""
    origin = get_origin(hint)
    if origin is Literal:
        return tuple(map(str, get_args(hint)))
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return tuple(member.value for member in hint)
    if origin in (Annotated, Union, UnionType, list):
        return tuple(choice for inner in get_args(hint) for choice in _choices(inner))
    return ()
