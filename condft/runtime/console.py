"""The console that tables go to."""

from rich.console import Console

__all__ = ["console"]


def console() -> Console:
    """A rich console of at least 120 columns: rich gives a log file 80, which would cut module names.

    It prints text unchanged: brackets and colons in the names of models and units are no markup.

    >>> console().print("model.layers[0]: [bold]")
    model.layers[0]: [bold]
    """
    return Console(width=max(120, Console().width), markup=False, emoji=False)
