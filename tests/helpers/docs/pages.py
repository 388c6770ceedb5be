"""The pages of the documentation and their code blocks.

A block is a fence. A comment on the line above it, which the rendered page does not show, says how a test treats it:

- `<!-- slow -->`: takes minutes; runs with `pytest -m slow` only.
- `<!-- needs: a GPU -->`: runs where that is at hand (`NEEDS`), and is listed as skipped elsewhere.
- `<!-- real model -->`: above a `text` block, an output that only the real model gives. It is not compared.

The commands of docs/results/ repeat studies, so there a block without a comment counts as `needs: hours`.

A `text` block right after a block is what that one prints; `...` is for what differs from run to run.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from markdown_it import MarkdownIt

from tests.helpers.processes import ROOT

MARK = re.compile(r"<!--\s*(slow|real model|needs: .+?)\s*-->\s*$")
NEEDS: dict[str, Callable[[], bool]] = {
    "a GPU": torch.cuda.is_available,
    "bitsandbytes": lambda: importlib.util.find_spec("bitsandbytes") is not None,
    "deepspeed": lambda: importlib.util.find_spec("deepspeed") is not None,
    # Downloads of packages, models and data: quickstart.sh and get_models have tests of their own for what they do.
    "the network": lambda: False,
    "hours": lambda: False,  # a study; its harness has tests at tiny size
}


@dataclass(frozen=True)
class Block:
    """A fence of a page.

    Attributes:
        page: File that it is in.
        line: Of its first line of code, from 1.
        language: Such as "python", "bash", "yaml" or "text".
        code: Without the fences.
        mark: What the comment above it says, or "".
        output: What it should print, or None where the page does not show it.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def unmet_need(self) -> str:
        """What the block needs and this machine does not have, or ""."""
        need = self.mark.removeprefix("needs: ") if self.mark.startswith("needs: ") else ""
        return need if need and not NEEDS[need]() else ""


def pages() -> list[Path]:
    """Everything that a reader is shown: README and contributing guide, and all pages of docs/."""
    root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [path for path in [*root, *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]


def blocks_of(page: Path) -> list[Block]:
    """All fences of a page in order, outputs joined to what prints them."""
    found: list[Block] = []
    end_of_last = 0  # line after the last fence: a `text` block is an output if nothing but blank lines is between
    lines = page.read_text(encoding="utf-8").splitlines()
    for start, end, language, code in _fences(lines):
        between = [line for line in lines[end_of_last:start] if line.strip()]
        mark = MARK.match(between[-1].strip()) if between else None
        block = Block(page, start + 2, language, code, mark[1] if mark else _default_mark(page))
        follows = bool(found) and len(between) == (1 if mark else 0)
        if language == "text" and follows and found[-1].language in ("python", "bash"):
            last = found.pop()
            shown = None if block.mark == "real model" else code
            block = Block(page, last.line, last.language, last.code, last.mark, shown)
        found.append(block)
        end_of_last = end
    return found


def _default_mark(page: Path) -> str:
    return "needs: hours" if page.is_relative_to(ROOT / "docs" / "results") else ""


def _fences(lines: list[str]) -> Iterator[tuple[int, int, str, str]]:
    for token in MarkdownIt().parse("\n".join(lines)):
        if token.type == "fence" and token.map is not None:
            language = token.info.split()[0] if token.info.strip() else ""
            yield token.map[0], token.map[1], language, token.content
