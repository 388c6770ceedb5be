"""Options that several commands share."""

from typing import Annotated

import typer

__all__ = ["NoCache", "Remote", "SkipBad"]

Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a checkpoint's own code.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Analyze again; neither read nor write the user's cache.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unusable clips out; count and report them.")]
