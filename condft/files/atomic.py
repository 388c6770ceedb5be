"""Atomic writing: a reader sees the whole old content or the whole new one, whatever kills the writer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yields a temporary file name beside `target`; on success it takes the target's place, on error it goes.

    Args:
        target: The file to write. Its folder is made if it does not exist.

    Yields:
        A path in the same folder (so the final rename cannot cross file systems), with the target's suffix.

    Raises:
        IsADirectoryError: `target` is a folder.
    """
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp is private (0600); the result is an ordinary file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one beside `target` which takes its place (replacing it) at the end."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():  # a folder cannot be renamed over a full one: step it aside first
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
            target.replace(aside / target.name)
            temporary.replace(target)
            shutil.rmtree(aside)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(target: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: str | Path, value: Any) -> None:
    """Writes strict JSON atomically (indented; NaN and infinity are refused: they are not JSON).

    Raises:
        ValueError: `value` holds NaN or infinity.
    """
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
