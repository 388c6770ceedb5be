"""Small pieces of Markdown that the generated pages are made of."""

import inspect
import itertools
import re
from collections.abc import Sequence

__all__ = ["GENERATED", "first_sentence", "prose_of", "table"]

GENERATED = "<!-- Written by python -m scripts.docs.reference from the code. Edit the code, then run it again. -->"

_NOT_PROSE = re.compile(r">>> |(?:Args|Returns|Raises|Attributes|Yields):\n")


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = inspect.cleandoc(docstring or "").split("\n\n")[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<=[.;:]) (?=[A-Z`])|: see ", text)[0].rstrip(".;: ") + "."


def prose_of(docstring: str | None) -> str:
    """The paragraphs of a docstring before its first section or example."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    kept = itertools.takewhile(lambda text: not _NOT_PROSE.match(text), paragraphs)
    return "\n\n".join(" ".join(text.split()) for text in kept)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped and a line break becomes a blank."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    # `\\|` of a formula is a double bar; in a table it would be read as the escape of a single one
    return " ".join(value.split()).replace("\\|", "\\Vert ").replace("|", "\\|")
