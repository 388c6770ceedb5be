"""A griffe extension: `>>>` examples of docstrings become code blocks, which Markdown would take for quotations.

.mkdocs.yml names it. Docstrings put an example after a blank line; it ends at the next one.
"""

from typing import Any

import griffe

__all__ = ["FencedExamples", "fenced"]


class FencedExamples(griffe.Extension):
    """Changes every docstring before mkdocstrings reads its sections."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Griffe calls it for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring whose examples are in fences; the rest of it unchanged."""
    lines: list[str] = []
    within = False
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if not within and line.lstrip().startswith(">>> "):
            lines.append(f"{indent}```pycon")
            within, margin = True, indent
        elif within and not line.strip():
            lines.append(f"{margin}```")
            within = False
        lines.append(line)
    return "\n".join([*lines, f"{margin}```"] if within else lines)
