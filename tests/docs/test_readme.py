"""The README is short: for a reader who decides within a minute."""

import re

import pytest

from tests.helpers.docs.pages import pages
from tests.helpers.processes import ROOT

README = ROOT / "README.md"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")


def prose() -> list[str]:
    """Blocks of text: paragraphs, and each item of a list; no code, no tables, no comments."""
    text = FENCE.sub("", README.read_text(encoding="utf-8"))
    blocks = re.split(r"\n\s*\n|\n(?=- )", text)
    return [
        " ".join(block.split()) for block in blocks if block.strip() and not block.lstrip().startswith(("|", "<!"))
    ]


def sentences(block: str) -> list[str]:
    return re.split(r"(?<=[.!?:])\s+", re.sub(r"\]\([^)]*\)", "]", block))


def test_the_file_is_small() -> None:
    assert README.stat().st_size < 8192


def test_no_block_and_no_sentence_is_long() -> None:
    assert [block for block in prose() if len(block.split()) > 90] == []
    assert [sentence for block in prose() for sentence in sentences(block) if len(sentence.split()) > 40] == []


def test_it_has_one_table_of_four_rows() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 4


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page) -> None:  # type: ignore[no-untyped-def]
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in LINK.findall(text) if not target.startswith("mailto:")]
    assert [target for target in targets if not (page.parent / target).exists()] == []
