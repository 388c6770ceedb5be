"""The run's metrics: one JSON line an optimizer step, in step with the checkpoints."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from condft.files.atomic import write_text


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line torn by a kill is left out. No file, no lines.

    Raises:
        ValueError: A line other than the last is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # text after the last newline is a torn write
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); restore the file, or --overwrite") from error
    return records


def truncate_metrics(path: str | Path, steps: int) -> list[dict[str, Any]]:
    """Cuts the file back, atomically, to its first `steps` lines: what a resumed run will not write again.

    Returns:
        The lines kept.

    Raises:
        ValueError: The file holds fewer lines than the checkpoint says were written.
    """
    records = read_metrics(path)
    if len(records) < steps:
        raise ValueError(f"{path} holds {len(records)} steps, the checkpoint {steps}: not of one run; use --overwrite")
    write_text(path, "".join(_line(record) for record in records[:steps]))
    return records[:steps]


class MetricsFile:
    """Appends records to a JSONL file, each flushed, so that a killed run keeps all but the line being written.

    Args:
        path: The file; its folder must exist.
        enabled: False on all ranks but the main one: nothing is opened or written.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True) -> None:
        self._file = Path(path).open("a", encoding="utf-8") if enabled else None  # noqa: SIM115 - closed in __exit__

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record; a float that is not finite becomes null (strict JSON has no NaN)."""
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _line(record: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
