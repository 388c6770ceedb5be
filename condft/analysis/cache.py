"""Reports of earlier analyses, kept by the content of the weights: a second start measures nothing again.

The folder is `$CONDFT_CACHE`, else `$XDG_CACHE_HOME/condft`, else `~/.cache/condft`. `CONDFT_CACHE=off` keeps nothing.

- `<model>-<units>-<content>.json` is a report (`SpectralReport.load` reads it) of what is known of some units:
  `<units>` stands for the names, shapes and dtypes of all units of the model, `<content>` for the names and digests of
  those that were asked for. Another report of a model of the same units (fine-tuned, or other names asked for) serves
  the units that have the same name and digest.
- `checkpoints/<folder>-<key>.json` remembers the units of a checkpoint folder and their digests by the path, size,
  times and inode of each of its files, so that files which nobody has touched are not read again.

Everything is written atomically, so several processes may share the folder: whoever comes later has the last word, and
a lost entry only costs work.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condft.analysis.measure import ALGORITHM_VERSION, UnitInfo, adopted, completed
from condft.files.atomic import write_json
from condft.files.cache_folder import cache_folder, caching_is_off
from condft.report import Role, SkippedWeight, SkipReason, SpectralReport, SpectralRow

__all__ = ["Cache", "CachedRows", "FolderFingerprint", "WeightIndex", "open_cache"]

_MOST_RELATIVES = 16  # reports of sibling models to look into, the newest first
# A file may change twice within one tick of its clock (2 s on FAT): one that changed just now is not remembered.
_TICK_NS = 2_000_000_000


@dataclass
class CachedRows:
    """What is known of some units.

    Attributes:
        rows: Name -> row.
        bounds: Name -> lower bound of the condition number, of units without a row.
        versions: Of what computed it all, if it all comes from one place.
    """

    rows: dict[str, SpectralRow] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class WeightIndex:
    """What a walk over a model yields, without values.

    Attributes:
        infos: All units.
        skipped: All other weights.
        digests: Name -> digest, of the units that were asked for.
    """

    infos: tuple[UnitInfo, ...]
    skipped: tuple[SkippedWeight, ...]
    digests: dict[str, str]


@dataclass(frozen=True)
class FolderFingerprint:
    """The files that decide what the units of a checkpoint folder are, and how they stand there now.

    Attributes:
        folder: The folder.
        granularity: Of the walk.
        files: File name -> real path, size, mtime in ns, inode and ctime in ns; and what else decides.
        taken_ns: When the stamp was taken.
    """

    folder: Path
    granularity: str
    files: dict[str, Any]
    taken_ns: int

    @classmethod
    def of(cls, folder: Path, granularity: str, *, trust_remote_code: bool) -> "FolderFingerprint":
        taken_ns = time.time_ns()
        files: dict[str, Any] = {
            "transformers": importlib.metadata.version("transformers"),  # which maps keys to parameters
            "algorithm": ALGORITHM_VERSION,
            "trust_remote_code": trust_remote_code,
        }
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".py") and path.is_file():
                status = path.stat()
                # ctime: unpacking and syncing put old times of modification back, and it cannot be put back
                files[path.name] = [
                    str(path.resolve()),
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ino,
                    status.st_ctime_ns,
                ]
        return cls(folder, granularity, files, taken_ns)

    def still_holds(self) -> bool:
        """Whether the files are as they were, and none changed so lately that a second change might not show."""
        trusted = self.files["trust_remote_code"]
        newest = max((entry[2] for entry in self.files.values() if isinstance(entry, list)), default=0)
        now = FolderFingerprint.of(self.folder, self.granularity, trust_remote_code=trusted)
        return now.files == self.files and newest <= self.taken_ns - _TICK_NS


def open_cache(cache: bool | str | Path) -> "Cache | None":
    """The cache of a folder, or the user's (True), or none (False, or `CONDFT_CACHE=off`)."""
    if isinstance(cache, bool):
        return Cache(cache_folder()) if cache and not caching_is_off() else None
    return Cache(Path(cache).expanduser())


@dataclass
class Cache:
    """One folder of reports. Nothing that is wrong with it ends an analysis: it is told in a warning."""

    folder: Path
    _told: set[Path] = field(default_factory=set)
    _unwritable: bool = False

    def find(
        self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str], enough: Callable[[CachedRows], bool]
    ) -> CachedRows:
        """What is known of the units that have a digest.

        Args:
            infos: All units of the model by name.
            digests: Name -> digest, of the units asked for.
            enough: Whether that is all that one needs to know; until then, reports of related models are read too.
        """
        known = CachedRows()
        own = self._entry(infos, digests)
        report = None if own is None else self._report(own, _content(digests))
        if report is not None:
            known.versions = {key: value for key, value in report.versions.items() if key != "content"}
            known.bounds = {unit.name: unit.condition_number_bound for unit in report.screened}
            _take_rows(known, report, infos, digests)
        if not enough(known):
            for relative in self._relatives(infos, own):
                if _take_rows(known, relative, infos, digests):
                    known.versions = None
                    if enough(known):
                        break
        return known

    def store(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str], report: SpectralReport) -> None:
        """Writes what is known of these units, in the place of what was there."""
        content = _content(digests)
        path = self._entry(infos, digests)
        if path is None:
            path = self.folder / f"{_slug(report.model)}-{_structure(infos)}-{content[:16]}.json"
        versions = report.versions | {"content": content}
        self._write(path, dataclasses.replace(report, versions=versions).to_dict())

    def recall(self, stamp: FolderFingerprint) -> WeightIndex | None:
        """The catalog of a checkpoint folder if none of its files has changed since it was remembered."""
        path = self._pointer(stamp)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return _catalog_from_json(value) if value["files"] == stamp.files else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._tell(path, f"is damaged ({error!r})")
            return None

    def remember(self, stamp: FolderFingerprint, catalog: WeightIndex) -> None:
        """Remembers a checkpoint folder by the stamp that was taken before its files were read."""
        if not stamp.still_holds():
            return
        before = self.recall(stamp)
        digests = catalog.digests if before is None else before.digests | catalog.digests
        value = _catalog_to_json(dataclasses.replace(catalog, digests=digests))
        if before is None or digests != before.digests:
            self._write(self._pointer(stamp), {"folder": str(stamp.folder), "files": stamp.files, **value})

    def _pointer(self, stamp: FolderFingerprint) -> Path:
        key = _hash([str(stamp.folder.resolve()), stamp.granularity])
        return self.folder / "checkpoints" / f"{_slug(stamp.folder.resolve().name)}-{key[:16]}.json"

    def _entry(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]) -> Path | None:
        """The file of these units, whatever the model was called when it was written."""
        return min(self.folder.glob(f"*-{_structure(infos)}-{_content(digests)[:16]}.json"), default=None)

    def _relatives(self, infos: Mapping[str, UnitInfo], own: Path | None) -> Iterator[SpectralReport]:
        """Reports of models with the same units. One that is of no use is passed over: its own model will tell."""
        found = [path for path in self.folder.glob(f"*-{_structure(infos)}-*.json") if path != own]
        for path in sorted(found, key=_changed, reverse=True)[:_MOST_RELATIVES]:
            try:
                report = SpectralReport.load(path)
            except (OSError, ValueError):
                continue
            if report.versions.get("algorithm") == str(ALGORITHM_VERSION):
                yield report

    def _report(self, path: Path, content: str) -> SpectralReport | None:
        try:
            report = SpectralReport.load(path)
        except FileNotFoundError:  # taken away since the folder was listed
            return None
        except (OSError, ValueError) as error:
            self._tell(path, str(error).removeprefix(f"{path}: "))
            return None
        algorithm = report.versions.get("algorithm")
        if algorithm != str(ALGORITHM_VERSION):
            self._tell(path, f"it was made by version {algorithm} of the algorithm, this is {ALGORITHM_VERSION}")
        elif report.versions.get("content") != content:
            self._tell(path, "it is of other weights than its name says")
        else:
            return report
        return None

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        if self._unwritable:
            return
        try:
            write_json(path, value)
        except OSError as error:
            self._unwritable = True
            warnings.warn(
                f"the cache {self.folder} cannot be written ({error}), so the next analysis starts over: set "
                "CONDFT_CACHE to a folder that can, or to off",
                stacklevel=2,
            )

    def _tell(self, path: Path, reason: str) -> None:
        if path not in self._told:
            self._told.add(path)
            warnings.warn(f"cache entry {path} is ignored and will be rewritten: {reason}", stacklevel=2)


def _take_rows(
    known: CachedRows, report: SpectralReport, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]
) -> bool:
    """Adds the rows of the units that have the same name and digest; whether any was new."""
    taken = False
    for row in report.rows:
        if digests.get(row.name) == row.digest and row.matrix_shape == infos[row.name].matrix_shape:
            before = known.rows.get(row.name)
            known.rows[row.name] = adopted(row, infos[row.name]) if before is None else completed(before, row)
            taken |= known.rows[row.name] != before
    return taken


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _structure(infos: Mapping[str, UnitInfo]) -> str:
    return _hash(sorted(f"{info.name} {info.shape} {info.dtype}" for info in infos.values()))[:8]


def _content(digests: Mapping[str, str]) -> str:
    return _hash(sorted(f"{name} {digest}" for name, digest in digests.items()))


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _slug(label: str) -> str:
    """The last part of a path, hub id or class name, as a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", Path(label).name).strip("._")[:60] or "model"


def _catalog_to_json(catalog: WeightIndex) -> dict[str, Any]:
    return {
        "units": [dataclasses.asdict(info) for info in catalog.infos],
        "skipped": [dataclasses.asdict(skip) for skip in catalog.skipped],
        "digests": catalog.digests,
    }


def _catalog_from_json(value: dict[str, Any]) -> WeightIndex:
    infos = tuple(
        UnitInfo(
            **{
                **info,
                "shape": tuple(info["shape"]),
                "matrix_shape": tuple(info["matrix_shape"]),
                "role": Role(info["role"]),
            }
        )
        for info in value["units"]
    )
    skipped = tuple(
        SkippedWeight(skip["name"], tuple(skip["shape"]), SkipReason(skip["reason"]), skip["detail"])
        for skip in value["skipped"]
    )
    return WeightIndex(infos, skipped, dict(value["digests"]))
