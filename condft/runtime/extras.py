"""The optional dependencies: which modules each extra of `pip install 'condft[…]'` brings, and the error without them.

    with needs_extra("plots"):
        from condft.plots.comparison import plot_comparison

Standard library only.
"""

import importlib.util
import sys
from contextlib import AbstractContextManager, nullcontext

__all__ = ["MissingExtraError", "needs_extra"]

# Top-level modules, not distributions: ruamel.yaml is in `ruamel`. pyproject.toml lists the distributions.
_MODULES = {
    "cli": ("rich", "typer"),
    "plots": ("matplotlib",),
    "recipe": ("datasets", "matplotlib", "rich", "ruamel", "tensorboard"),
    "speech": ("jiwer", "soundfile", "soxr"),
}


class MissingExtraError(ModuleNotFoundError):
    """A part of condft needs modules that are not installed. The message has the command that installs them."""


def needs_extra(*extras: str) -> AbstractContextManager[None]:
    """Checks that the modules of extras are installed, without importing them.

    Without the check, the error of the first failing import would name a package that the user does not know, and
    not the extra that brings it. Modules that are imported late (`datasets`) would be missed at the end of a long run.

    Args:
        extras: Any of "cli", "plots", "recipe" and "speech".

    Returns:
        A context manager that does nothing: the imports below it stay at the top of a module for linters.

    Raises:
        MissingExtraError: Names the missing modules and the command.

    Example:
        >>> with needs_extra("plots"):
        ...     from matplotlib.figure import Figure
    """
    missing = {name: extra for extra in extras for name in _MODULES[extra] if not _is_installed(name)}
    if missing:
        wanted = ",".join(dict.fromkeys(missing.values()))
        raise MissingExtraError(
            f"this part of condft needs {', '.join(missing)}: pip install 'condft[{wanted}]'", name=next(iter(missing))
        )
    return nullcontext()


def _is_installed(name: str) -> bool:
    # Looked up first: find_spec raises on a module that was put into sys.modules without a spec.
    # None there blocks an import, as tests do to act out a missing package.
    return sys.modules[name] is not None if name in sys.modules else importlib.util.find_spec(name) is not None
