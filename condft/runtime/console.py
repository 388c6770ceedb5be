"""The console that tables go to."""

from rich.console import Console

__all__ = ["console"]


def console() -> Console:
    """A rich console of at least 120 columns: a log file has no width, and 80 columns would cut module names.

    It takes text as it stands: brackets and colons in the names of models and units are no markup.
    """
    return Console(width=max(120, Console().width), markup=False, emoji=False)
