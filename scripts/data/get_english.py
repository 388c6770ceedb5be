"""Puts English prose into three files: technical prose to pre-train on and held out, and prose of another trade.

    python -m scripts.data.get_english                      # into data/english/, by apt-get download
    python -m scripts.data.get_english --packages FOLDER    # from packages (.deb) already at hand, no network

Manuals of Debian's archive: whole documents are held out, chosen by a hash of their names, and no paragraph of theirs
stays in the other file. `general.txt` is a long book of political theory and history (An Anarchist FAQ), English
that is not about computers: what German prose about computers does to a model's English is
not seen on English prose about computers. The texts differ a little between Debian's releases; what is trained or
measured on them carries a digest. Free licenses, GPL, GFDL and Artistic: each package's `copyright` says which.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from condft.files.atomic import write_text
from scripts.data.debian import fetch_package, read_text, unpack
from scripts.data.prose import ENGLISH, READERS, prose_of

# Not debian-reference-en: its German translation is what the study adapts to.
PACKAGES = (
    "perl-doc",
    "git-doc",
    "debian-handbook",
    "binutils-doc",
    "bash-doc",
    "debian-policy",
    "developers-reference",
)
GENERAL = ("anarchism",)
_FOREIGN = "/debian-handbook/html/"  # holds the book in all its languages
_HELD_OUT_OF = 48  # one document in so many


@dataclass(frozen=True)
class Split:
    """Prose of two sets of documents, paragraphs two newlines apart."""

    train: str
    held_out: str


def documents(package: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(name, prose) of every document of an unpacked package, in the order of the names."""
    for path in sorted(folder.rglob("*")):
        name = f"{package}/{path.relative_to(folder)}"
        suffix = Path(name.removesuffix(".gz")).suffix
        if suffix not in READERS or not path.is_file() or path.is_symlink():
            continue
        if _FOREIGN in name and "/en-US/" not in name:
            continue
        prose = prose_of(READERS[suffix](read_text(path)), ENGLISH)
        if prose:
            yield name, prose


def split_documents(found: list[tuple[str, str]]) -> Split:
    """Holds out one document in 48; a paragraph counts once, and where it is held out it is not trained on."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for name, prose in found:
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % _HELD_OUT_OF == 0
        parts[held_out] += prose.split("\n\n")
    held_out_once = dict.fromkeys(parts[True])
    train = dict.fromkeys(paragraph for paragraph in parts[False] if paragraph not in held_out_once)
    return Split("\n\n".join(train), "\n\n".join(held_out_once))


def joined(found: list[tuple[str, str]]) -> str:
    """All documents' paragraphs, each once."""
    return "\n\n".join(dict.fromkeys(paragraph for _, prose in found for paragraph in prose.split("\n\n")))


def read_packages(packages: Sequence[str], folder: Path | None) -> list[tuple[str, str]]:
    """The documents of these packages, from a folder of .deb files or fetched."""
    found: list[tuple[str, str]] = []
    for package in packages:
        with tempfile.TemporaryDirectory() as scratch:
            deb = next(folder.glob(f"{package}_*.deb"), None) if folder else fetch_package(package, Path(scratch))
            if deb is None:
                raise FileNotFoundError(f"no {package}_*.deb in {folder}; without --packages it is fetched")
            root = Path(scratch) / "root"
            root.mkdir()
            unpack(deb, root)
            found += documents(package, root)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/english"))
    parser.add_argument("--packages", type=Path, help="a folder of .deb files already at hand")
    arguments = parser.parse_args()
    split = split_documents(read_packages(PACKAGES, arguments.packages))
    general = joined(read_packages(GENERAL, arguments.packages))
    for name, text in (("train", split.train), ("held_out", split.held_out), ("general", general)):
        if not text:
            raise SystemExit(f"no English prose for {name}: have the packages' layouts changed?")
        write_text(arguments.output / f"{name}.txt", text + "\n")
        words, paragraphs = len(text.split()), len(text.split("\n\n"))
        print(f"{arguments.output / name}.txt: {words:,} words in {paragraphs:,} paragraphs")


if __name__ == "__main__":
    main()
