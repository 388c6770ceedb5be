"""Prose from documentation: the paragraphs that are sentences of a language, without markup."""

import re
from collections.abc import Callable, Collection
from html.parser import HTMLParser

GERMAN = frozenset(
    ["der", "die", "das", "und", "ist", "sind", "ein", "eine", "zu", "von", "mit", "für", "auf", "den", "nicht"]
)
ENGLISH = frozenset(
    [
        "the",
        "a",
        "an",
        "and",
        "is",
        "are",
        "of",
        "to",
        "in",
        "that",
        "for",
        "with",
        "not",
        "on",
        "it",
        "be",
        "or",
        "as",
    ]
)
_FEWEST_WORDS, _FEWEST_LETTERS = 12, 0.75  # of a paragraph of prose: words, and the share of letters and blanks


def prose_of(text: str, function_words: Collection[str]) -> str:
    """The paragraphs of prose of a plain text, one a line, each once.

    Args:
        text: Paragraphs apart by empty lines, their lines broken anywhere.
        function_words: Of the language, small letters; an eighth of a paragraph's words must be among them.

    Returns:
        The paragraphs, two newlines apart; empty if there are none.
    """
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(dict.fromkeys(found for found in paragraphs if _is_prose(found, function_words)))


def _is_prose(paragraph: str, function_words: Collection[str]) -> bool:
    words = paragraph.split()
    if len(words) < _FEWEST_WORDS or paragraph[0] in "$#|+•*" or paragraph[-1] not in ".:!?)":
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph) / len(paragraph)
    return letters >= _FEWEST_LETTERS and sum(word.lower() in function_words for word in words) >= len(words) // 8


def pod_text(source: str) -> str:
    """Text of Perl's Plain Old Documentation without commands, code and codes; a link becomes its target."""
    blocks = [block for block in re.split(r"\n[ \t]*\n", source) if block and block[0] not in "= \t"]
    text = "\n\n".join(blocks).replace("E<lt>", "\x01").replace("E<gt>", "\x02")  # not to be taken for brackets
    text = re.sub(r"[A-Z](<<+)\s+(.*?)\s+>>+", r"\2", text, flags=re.DOTALL)
    while (plain := re.sub(r"[A-Z]<(?:[^<>|]*\|)?([^<>]*)>", r"\1", text)) != text:  # codes lie in codes
        text = plain
    return text.replace("\x01", "<").replace("\x02", ">")


def html_text(source: str) -> str:
    """Text of the paragraphs, items and definitions of an HTML page, two newlines apart; nothing preformatted."""
    reader = _Paragraphs()
    reader.feed(source)
    reader.close()
    return reader.text


class _Paragraphs(HTMLParser):
    _BREAKS, _LEFT_OUT = ("p", "li", "dd", "dt", "td", "th", "div", "h1", "h2", "h3", "h4"), ("pre", "script", "style")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self._inside = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside += tag in self._LEFT_OUT
        if tag in self._BREAKS or tag in self._LEFT_OUT:
            self.text += "\n\n"

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in self._LEFT_OUT
        if tag in self._BREAKS:
            self.text += "\n\n"

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += re.sub(r"\n\s*\n", "\n", data)


def plain_text(source: str) -> str:
    """The text itself: `.txt` and `.info` files have no markup between their paragraphs."""
    return source


READERS: dict[str, Callable[[str], str]] = {
    ".pod": pod_text,
    ".html": html_text,
    ".txt": plain_text,
    ".info": plain_text,
}
"""Suffix of a documentation file -> what makes plain text of it."""
