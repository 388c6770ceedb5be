"""The run's metrics file: one line of JSON for each optimizer step."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from condft.files.atomic import write_text

__all__ = ["MetricsFile", "read_metrics", "truncate_metrics"]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, one for each optimizer step. Empty if there is no file.

    An incomplete last line, from a run that was killed while writing, is left out.

    Raises:
        ValueError: A complete line is not JSON.

    >>> with MetricsFile("metrics.jsonl") as metrics:
    ...     metrics.append({"step": 1, "loss": 2.5})
    ...     metrics.append({"step": 2, "loss": 2.25})
    >>> [record["loss"] for record in read_metrics("metrics.jsonl")]
    [2.5, 2.25]
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # text after the last newline is an incomplete line
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); restore the file, or --overwrite") from error
    return records


def truncate_metrics(path: str | Path, steps: int) -> list[dict[str, Any]]:
    """Cuts the file to its first `steps` lines, atomically: a resumed run writes the later ones again.

    Returns:
        The records that are kept.

    Raises:
        ValueError: The file holds fewer lines than the checkpoint has steps.
    """
    records = read_metrics(path)
    if len(records) < steps:
        raise ValueError(f"{path} holds {len(records)} steps, the checkpoint {steps}: not of one run; use --overwrite")
    # Also where no record is cut: an incomplete last line must go before more lines are appended.
    write_text(path, "".join(_line(record) for record in records[:steps]))
    return records[:steps]


class MetricsFile:
    """Appends records to a JSON Lines file. Each is flushed: a killed run loses at most the line being written.

    Args:
        path: The file. Its folder must exist.
        enabled: False in all processes but the main one: no file is opened and nothing written.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True) -> None:
        self._file = Path(path).open("a", encoding="utf-8") if enabled else None  # noqa: SIM115 - closed in __exit__

    def append(self, record: dict[str, Any]) -> None:
        """Writes one record. A float that is not finite becomes null: strict JSON has no NaN."""
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
