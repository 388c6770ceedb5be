"""Errors that a user can mend are one line, not a traceback."""

import sys

import typer

__all__ = ["UserErrors"]

# What a user can mend. Anything else is a bug and keeps its traceback.
_USER_ERRORS = (ValueError, OSError)  # of a missing file, a full disk, a hub that does not answer


class UserErrors:
    """Turns errors that a user can mend into one message on stderr and exit code 1, without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, _USER_ERRORS) and not isinstance(error, BrokenPipeError):  # typer ends quietly by itself
            typer.secho(f"condft: {error}", err=True, fg=typer.colors.RED if sys.stderr.isatty() else None)
            raise typer.Exit(1) from error
