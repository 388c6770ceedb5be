"""Errors that a user can fix are one line, not a traceback; and they come before the work, where that is possible."""

import sys
from pathlib import Path

import typer

from condft.runtime.extras import MissingExtraError

__all__ = ["UserErrors", "checked_picture"]

# What a user can fix: a wrong value, a missing file, a full disk, a hub that does not answer, a missing extra.
# Anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, MissingExtraError)


class UserErrors:
    """Within it, an error that a user can fix becomes one message on stderr and exit code 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # A broken pipe is an OSError, but `condft analyze … | head` is no mistake; typer ends quietly on it.
        if isinstance(error, _USER_ERRORS) and not isinstance(error, BrokenPipeError):
            typer.secho(f"condft: {error}", err=True, fg=typer.colors.RED if sys.stderr.isatty() else None)
            raise typer.Exit(1) from error


def checked_picture(path: Path | None) -> Path | None:
    """Callback of options and arguments that name a picture: a long analysis must not end with a refused path."""
    if path is not None:
        with UserErrors():
            from condft.plots import check_picture_path

            check_picture_path(path)
    return path
