"""Debian packages as a source of text: fetched by Debian's own client, unpacked without installing them."""

import gzip
import subprocess
from pathlib import Path


def fetch_package(name: str, folder: Path) -> Path:
    """Fetches a package into a folder by `apt-get download`, which needs no root.

    Raises:
        RuntimeError: apt-get does not get it; says what it said.
    """
    _call(["apt-get", "download", name], str(folder))
    return next(folder.glob(f"{name}_*.deb"))


def unpack(package: Path, folder: Path) -> None:
    """Unpacks a package's files into a folder.

    Raises:
        FileNotFoundError: No such package, or no dpkg-deb.
        RuntimeError: dpkg-deb cannot read it.
    """
    if not package.is_file():
        raise FileNotFoundError(f"no package {package}; without --package it is fetched by apt-get download")
    _call(["dpkg-deb", "-x", str(package.resolve()), str(folder)], str(folder))


def read_text(path: Path) -> str:
    """A UTF-8 text file, gzipped or not; bytes that are not UTF-8 become U+FFFD."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")


def _call(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
