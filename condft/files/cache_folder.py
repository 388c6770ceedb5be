"""Where condft keeps what can be computed again: one folder, by one rule, for reports and features."""

import os
from pathlib import Path

__all__ = ["cache_folder", "caching_is_off"]


def cache_folder() -> Path:
    """`$CONDFT_CACHE`, else `condft` in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`).

    `CONDFT_CACHE=off` names no folder. It turns the cache of reports off (`caching_is_off`); audio features are
    still written, since all processes read them from there, and go to the user's folder.

    >>> import os
    >>> os.environ["CONDFT_CACHE"] = "/scratch/condft"
    >>> cache_folder()
    PosixPath('/scratch/condft')
    >>> os.environ["CONDFT_CACHE"] = "off"
    >>> cache_folder().name, caching_is_off()
    ('condft', True)
    """
    named = os.environ.get("CONDFT_CACHE", "")
    if named and not caching_is_off():
        return Path(named).expanduser()
    # An empty XDG_CACHE_HOME counts as unset (XDG Base Directory Specification).
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "condft"


def caching_is_off() -> bool:
    """Whether the user wants no cache of reports: `CONDFT_CACHE=off`."""
    return os.environ.get("CONDFT_CACHE") == "off"
