"""The units of a checkpoint folder, kept without values, and the check that the folder has not changed since.

An unchanged folder need not be read: its index says what its units are and what their digests are. Whether it is
unchanged is decided by path, size, times and inode of each of its files.
"""

import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from condft.analysis.measure import ALGORITHM_VERSION, UnitInfo
from condft.report import SkippedWeight

__all__ = ["FolderFingerprint", "WeightIndex", "index_from_json", "index_to_json"]

# A file may change twice within one tick of its clock (2 s on FAT), and the second change would not show. So a folder
# with a file that is younger than that gets no index.
_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class WeightIndex:
    """What a walk over a model yields, without values.

    Attributes:
        units: All units.
        skipped: All other weights.
        digests: Name -> digest, of the units that were requested so far.
    """

    units: tuple[UnitInfo, ...]
    skipped: tuple[SkippedWeight, ...]
    digests: dict[str, str]


@dataclass(frozen=True)
class FolderFingerprint:
    """The files that decide what the units of a checkpoint folder are, and the state of these files at one time.

    Attributes:
        folder: The folder.
        granularity: Of the walk.
        files: File name -> real path, size, mtime in ns, inode and ctime in ns; and the versions and options that the
            units depend on.
        taken_ns: When the fingerprint was taken.
    """

    folder: Path
    granularity: str
    files: dict[str, Any]
    taken_ns: int

    @classmethod
    def of(cls, folder: Path, granularity: str, *, trust_remote_code: bool) -> "FolderFingerprint":
        """The fingerprint of a folder as it is now."""
        taken_ns = time.time_ns()  # before any file is looked at: what changes later has a later time
        files: dict[str, Any] = {
            "transformers": importlib.metadata.version("transformers"),  # it maps keys to parameters
            "algorithm": ALGORITHM_VERSION,
            "trust_remote_code": trust_remote_code,
        }
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".py") and path.is_file():
                status = path.stat()
                files[path.name] = [
                    str(path.resolve()),  # in the hub's cache files are links: another revision links elsewhere
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ino,
                    # tar and rsync put an old mtime back after they have written; no program can set ctime back.
                    status.st_ctime_ns,
                ]
        return cls(folder, granularity, files, taken_ns)

    def still_holds(self) -> bool:
        """Whether the files are unchanged, and all old enough that a second change would show (see `_TICK_NS`)."""
        trusted = self.files["trust_remote_code"]
        # entry[2] is the mtime; versions and options are no lists.
        newest = max((entry[2] for entry in self.files.values() if isinstance(entry, list)), default=0)
        now = FolderFingerprint.of(self.folder, self.granularity, trust_remote_code=trusted)
        return now.files == self.files and newest <= self.taken_ns - _TICK_NS


@dataclass(frozen=True)
class _IndexFile(WeightIndex):
    """The JSON of `checkpoints/*.json`: an index, and the fingerprint of the folder that it belongs to."""

    folder: str
    files: dict[str, Any]


_INDEX_FILE = TypeAdapter(_IndexFile)


def index_to_json(index: WeightIndex, fingerprint: FolderFingerprint) -> dict[str, Any]:
    """The JSON value of an index and of the fingerprint that was taken before the folder's files were read."""
    file = _IndexFile(index.units, index.skipped, index.digests, str(fingerprint.folder), fingerprint.files)
    return cast(dict[str, Any], _INDEX_FILE.dump_python(file, mode="json"))


def index_from_json(text: bytes, fingerprint: FolderFingerprint) -> WeightIndex | None:
    """The index in a file that `index_to_json` made; None if the folder's files are not what they were then.

    Raises:
        ValueError: The text is no such JSON: says where.
    """
    try:
        file = _INDEX_FILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"it is damaged{f' at {place}' if place else ''}: {first['msg']}") from error
    if file.files != fingerprint.files:
        return None
    return WeightIndex(file.units, file.skipped, file.digests)
