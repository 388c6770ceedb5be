"""The command line: `condft analyze | select | compare | plot | train | evaluate`, one file for each command.

`python -m condft` is the same program, and so is `scripts/train.py` for `condft train`. Heavy imports are inside the
commands, so that `condft --help` answers at once.
"""

import sys
from collections.abc import Sequence

from condft.runtime.extras import MissingExtraError, needs_extra

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        The exit code: 0, 1 for an error that has been printed as one line, 2 for wrong arguments.

    Example:
        >>> report.save("report.json")
        >>> main(["plot", "report.json", "condition_numbers.png"])
        0
    """
    try:
        needs_extra("cli")
    except MissingExtraError as error:  # one line: the traceback of an import says nothing to a user
        print(f"condft: {error}", file=sys.stderr)
        return 1
    from condft.cli.app import app  # needs typer

    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="condft")
    except SystemExit as ended:  # click's way to end, also after success
        return ended.code if isinstance(ended.code, int) else 0
    return 0
