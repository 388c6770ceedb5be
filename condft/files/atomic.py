"""Atomic writing: a reader sees the whole old content or the whole new one, also if the writer is killed.

The content goes to a temporary name in the same folder, to the disk, and then by one rename to its own name.
"""

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
    """Yields a temporary file in the folder of `target`; on success it replaces `target`, on error it is deleted.

    Args:
        target: The file to write. Its folder is made if it does not exist.

    Yields:
        A path in the same folder (so the final rename cannot cross file systems), with the target's suffix.

    Raises:
        IsADirectoryError: `target` is a folder.

    >>> with atomic_path("weights.bin") as temporary:
    ...     _ = temporary.write_bytes(b"all of it")
    >>> Path("weights.bin").read_bytes()
    b'all of it'
    """
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)  # the caller writes by name; only the unique name is needed
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)  # before the rename: else a power cut can leave the new name with empty content
        temporary.chmod(0o666 & ~_umask())  # mkstemp is private (0600); the result is an ordinary file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # missing after a success: it was renamed


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one next to `target`, which replaces `target` at the end.

    A folder that exists is moved aside first, since a rename cannot replace a folder with content. Between the two
    renames there is no `target`: a reader sees no folder for that moment, but never a mixed one.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
            target.replace(aside / target.name)
            temporary.replace(target)
            shutil.rmtree(aside)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone after a success: it was renamed


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
        os.fsync(file.fileno())  # of the file, through any handle: also what the caller wrote through its own


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask
