"""Puts German prose into a file: the paragraphs of the Debian-Referenz, from Debian's archive (GPL-2+).

    python scripts/get_german.py                        # into data/german/debian-reference.txt, by apt-get download
    python scripts/get_german.py --package FILE.deb     # from a package already at hand, no network

Code, tables and lists of commands are left out. The text differs a little between Debian's releases; a study's runs
carry a digest of it.
"""

import argparse
import gzip
import re
import subprocess
import tempfile
from pathlib import Path

from condft.files import write_text

PACKAGE = "debian-reference-de"
TEXT = "usr/share/debian-reference/debian-reference.de.txt.gz"
_FUNCTION_WORDS = frozenset(
    ["der", "die", "das", "und", "ist", "sind", "ein", "eine", "zu", "von", "mit", "für", "auf", "den", "nicht"]
)
_FEWEST_WORDS, _FEWEST_LETTERS = 12, 0.75  # of a paragraph of prose: words, and the share of letters and blanks


def prose_of(text: str) -> str:
    """The paragraphs of German prose of a plain-text book, one a line, each once.

    Args:
        text: Paragraphs apart by empty lines, their lines broken anywhere.

    Returns:
        The paragraphs, two newlines apart; empty if there are none.
    """
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < _FEWEST_WORDS or paragraph[0] in "$#|+•*" or paragraph[-1] not in ".:!?)":
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph) / len(paragraph)
    return letters >= _FEWEST_LETTERS and sum(word.lower() in _FUNCTION_WORDS for word in words) >= len(words) // 8


def read_package(package: Path) -> str:
    """The book's text out of a Debian package.

    Raises:
        FileNotFoundError: No such package, or no dpkg-deb.
        RuntimeError: dpkg-deb cannot read it.
    """
    if not package.is_file():
        raise FileNotFoundError(f"no package {package}; without --package it is fetched by apt-get download")
    with tempfile.TemporaryDirectory() as folder:
        _call(["dpkg-deb", "-x", str(package.resolve()), folder], folder)
        return gzip.decompress((Path(folder) / TEXT).read_bytes()).decode("utf-8")


def fetch_package(folder: Path) -> Path:
    """Fetches the package into a folder by `apt-get download`, which needs no root.

    Raises:
        RuntimeError: apt-get does not get it; says what it said.
    """
    _call(["apt-get", "download", PACKAGE], str(folder))
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def _call(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/german/debian-reference.txt"))
    parser.add_argument("--package", type=Path, help="a .deb already at hand")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prose = prose_of(read_package(arguments.package or fetch_package(Path(folder))))
    if not prose:
        raise SystemExit(f"no German prose in {arguments.package or PACKAGE}: has its layout changed?")
    write_text(arguments.output, prose + "\n")
    print(f"{arguments.output}: {len(prose.split()):,} words in {prose.count(chr(10) * 2) + 1:,} paragraphs")


if __name__ == "__main__":
    main()
