"""What the benchmarks share: arguments, the results file (parts of it can be made again), and what made a part."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from condft.recipe.provenance import code_commit, machine, versions

__all__ = ["arguments_of", "earlier_results", "made_by"]


def arguments_of(doc: str | None, parts: Iterable[str], out: str, repeats: int) -> argparse.Namespace:
    """`only` (a list, or None for everything), `repeats`, `out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(parts), action="append", help="leave the rest out")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser.parse_args()


def earlier_results(arguments: argparse.Namespace) -> dict[str, Any]:
    """The present content of the file if only parts of it are made again, else an empty one."""
    kept = arguments.only and arguments.out.exists()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if kept else {}
    results.setdefault("made_by", {})
    return results


def made_by(command: str, repeats: int) -> dict[str, Any]:
    """The command that made a part, with commit, machine and versions."""
    return {
        "script": command,
        "commit": code_commit(),
        "machine": machine(),
        "versions": versions(),
        "repeats": repeats,
    }
