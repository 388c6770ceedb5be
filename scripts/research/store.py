"""The results of all experiments: JSONL files that several processes append to, and locks that share the work.

Reading is `condft.training.read_metrics`. An experiment's own view of its file (which lines belong to the settings of
today) is in its folder: `study/results.py`, `damage/columns.py`, `kappa/columns.py`, `pretraining/run.py`.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["append_line", "claimed", "lines_by_name", "waiting_for"]


def append_line(path: str | Path, record: dict[str, Any]) -> None:
    """Appends one record by a single write, so that lines of several processes never mix.

    Raises:
        ValueError: NaN or infinity in the record: they are not JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    # O_APPEND: the kernel moves to the end and writes in one step; Python's buffered files might split a long line
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
    if written != len(line):
        raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")


def lines_by_name(lines: Iterable[dict[str, Any]], kind: str, experiment: str) -> dict[str, dict[str, Any]]:
    """Name -> line of a kind of one experiment; the first, should there be two."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["kind"] == kind and line["experiment"] == experiment:
            found.setdefault(line["name"], line)
    return found


@contextmanager
def claimed(folder: str | Path, key: str) -> Iterator[bool]:
    """Inside, this process alone has the run; yields False if another process has it.

    The lock ends with the process, even if it is killed, so an interrupted run is free again at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def waiting_for(folder: str | Path, name: str) -> Iterator[None]:
    """Inside, no other process is in the section of this name: what processes share is made once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
