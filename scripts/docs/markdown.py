"""Small pieces of Markdown that the generated pages are made of."""

import inspect
import re
from collections.abc import Sequence

__all__ = ["GENERATED", "first_sentence", "table"]

GENERATED = "<!-- Written by python -m scripts.docs.reference from the code. Edit the code, then run it again. -->"


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = inspect.cleandoc(docstring or "").split("\n\n")[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<=[.;:]) (?=[A-Z`])|: see ", text)[0].rstrip(".;: ") + "."


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped and a line break becomes a blank."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
