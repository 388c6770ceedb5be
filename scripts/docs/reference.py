"""Writes the reference pages that the code itself defines; a test compares the committed pages with the output.

python -m scripts.docs.reference
"""

from collections.abc import Callable
from pathlib import Path

from scripts.docs.api import api_pages
from scripts.docs.command_line import command_line_page
from scripts.docs.options import config_page, yaml_page

__all__ = ["FOLDER", "pages", "write_pages"]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"

_SINGLE: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "yaml.md": yaml_page,
    "command-line.md": command_line_page,
}


def pages() -> dict[str, str]:
    """Path below docs/reference -> content, of every page that is written from the code."""
    return {**{name: make() for name, make in _SINGLE.items()}, **api_pages()}


def write_pages(folder: Path = FOLDER) -> list[Path]:
    """Writes the pages and removes pages of packages that no longer exist; returns what was written."""
    content = pages()
    for stale in set((folder / "api").glob("*.md")) - {folder / name for name in content}:
        stale.unlink()
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in content]


if __name__ == "__main__":
    for path in write_pages():
        print(path)
