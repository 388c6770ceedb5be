"""Rows that were measured before, stored by the content of the weights: a second start measures nothing again.

The folder is `$CONDFT_CACHE`, else `$XDG_CACHE_HOME/condft`, else `~/.cache/condft`. With `CONDFT_CACHE=off`, nothing
is stored.

- `<model>-<structure>-<content>.json` is a report (`SpectralReport.load` reads it) of what is known about some units.
  `<structure>` is a hash of the names, shapes and dtypes of all units of the model. `<content>` is a hash of the names
  and digests of the requested units. A report with the same structure and other content (of a fine-tuned model, or of
  other requested names) serves the units that have the same name and digest.
- `checkpoints/<folder>-<key>.json` holds the units of a checkpoint folder and their digests, and a fingerprint of its
  files (see `condft.analysis.index`). While no file has changed, its weights are not even read.

Everything is written atomically, so several processes may share the folder. The later write wins; a lost entry costs
work, nothing else.
"""

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condft.analysis.index import FolderFingerprint, WeightIndex, index_from_json, index_to_json
from condft.analysis.measure import ALGORITHM_VERSION, UnitInfo, merged_row, row_for_unit
from condft.files.atomic import write_json
from condft.files.cache_folder import cache_folder, caching_is_off
from condft.report import SpectralReport, SpectralRow

__all__ = ["Cache", "CachedRows", "open_cache"]

_MOST_SIBLINGS = 16  # reports of models of the same structure to look into, the newest first


@dataclass
class CachedRows:
    """What the cache knows about some units.

    Attributes:
        rows: Name -> row.
        bounds: Name -> lower bound of the condition number, of units without a row.
        versions: Of the software that computed it all, if that is the same for all.
    """

    rows: dict[str, SpectralRow] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] | None = None


def open_cache(cache: bool | str | Path) -> "Cache | None":
    """The cache of a folder, or the user's (True), or none (False, or `CONDFT_CACHE=off`)."""
    if isinstance(cache, bool):
        return Cache(cache_folder()) if cache and not caching_is_off() else None
    return Cache(Path(cache).expanduser())


@dataclass
class Cache:
    """One folder of reports. A fault in it never ends an analysis: a warning names it, and the work is done again.

    Attributes:
        folder: The folder; it need not exist.
    """

    folder: Path
    _warned: set[Path] = field(default_factory=set)
    _unwritable: bool = False

    def iter_rows(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]) -> Iterator[CachedRows]:
        """Yields what is known about the units that have a digest, more each time; stop when it is enough.

        The first one comes from these units' own report, the following ones from reports of sibling models too.
        Reading these takes longer, so it depends on the caller whether they are read at all.

        Args:
            infos: All units of the model by name.
            digests: Name -> digest, of the requested units.

        Yields:
            The same object each time, grown.
        """
        cached = CachedRows()
        own = self._report_path(infos, digests)
        report = None if own is None else self._read_report(own, _content_hash(digests))
        if report is not None:
            # "content" is about the file, not about who computed its rows.
            cached.versions = {key: value for key, value in report.versions.items() if key != "content"}
            cached.bounds = {unit.name: unit.condition_number_bound for unit in report.screened}
            _add_rows(cached, report, infos, digests)
        yield cached
        for sibling in self._sibling_reports(infos, own):
            if _add_rows(cached, sibling, infos, digests):
                cached.versions = None  # of two computers or more
                yield cached

    def write_rows(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str], report: SpectralReport) -> None:
        """Writes what is known about these units; replaces what was there."""
        content = _content_hash(digests)
        path = self._report_path(infos, digests)
        if path is None:
            path = self.folder / f"{_file_name(report.model)}-{_structure_hash(infos)}-{content[:16]}.json"
        # The name has 16 digits of the hash only. The whole one is inside, and `_read_report` compares it.
        versions = report.versions | {"content": content}
        self._write(path, dataclasses.replace(report, versions=versions).to_dict())

    def read_index(self, fingerprint: FolderFingerprint) -> WeightIndex | None:
        """The index of a checkpoint folder, if none of its files has changed since it was written."""
        path = self._index_path(fingerprint)
        try:
            return index_from_json(path.read_bytes(), fingerprint)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(path, str(error))
            return None

    def write_index(self, fingerprint: FolderFingerprint, index: WeightIndex) -> None:
        """Writes the index of a checkpoint folder, with the fingerprint that was taken before its files were read.

        Nothing is written if a file changed in the meantime, or so recently that another change might not show.
        Digests that are in the index already are kept.
        """
        if not fingerprint.still_holds():
            return
        before = self.read_index(fingerprint)
        digests = index.digests if before is None else before.digests | index.digests
        if before is None or digests != before.digests:
            complete = dataclasses.replace(index, digests=digests)
            self._write(self._index_path(fingerprint), index_to_json(complete, fingerprint))

    def _index_path(self, fingerprint: FolderFingerprint) -> Path:
        folder = fingerprint.folder.resolve()
        key = _hash([str(folder), fingerprint.granularity])
        return self.folder / "checkpoints" / f"{_file_name(folder.name)}-{key[:16]}.json"

    def _report_path(self, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]) -> Path | None:
        """The file of these units' report, under any name that the model had when it was written."""
        # Several may fit. The first by name, so that the same file is read and replaced each time.
        return min(self.folder.glob(f"*-{_structure_hash(infos)}-{_content_hash(digests)[:16]}.json"), default=None)

    def _sibling_reports(self, infos: Mapping[str, UnitInfo], own: Path | None) -> Iterator[SpectralReport]:
        """Reports of models of the same structure. A damaged one is passed over: its own model will warn of it."""
        found = [path for path in self.folder.glob(f"*-{_structure_hash(infos)}-*.json") if path != own]
        for path in sorted(found, key=_mtime, reverse=True)[:_MOST_SIBLINGS]:
            try:
                report = SpectralReport.load(path)
            except (OSError, ValueError):
                continue
            if report.versions.get("algorithm") == str(ALGORITHM_VERSION):
                yield report

    def _read_report(self, path: Path, content: str) -> SpectralReport | None:
        try:
            report = SpectralReport.load(path)
        except FileNotFoundError:  # removed since the folder was listed
            return None
        except (OSError, ValueError) as error:
            self._warn(path, str(error).removeprefix(f"{path}: "))
            return None
        algorithm = report.versions.get("algorithm")
        if algorithm != str(ALGORITHM_VERSION):
            self._warn(path, f"it was made by version {algorithm} of the algorithm, this is {ALGORITHM_VERSION}")
        elif report.versions.get("content") != content:
            self._warn(path, "it is of other weights than its name says")
        else:
            return report
        return None

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        if self._unwritable:  # one warning is enough
            return
        try:
            write_json(path, value)
        except OSError as error:
            self._unwritable = True
            warnings.warn(
                f"the cache {self.folder} cannot be written ({error}), so the next analysis starts over: set "
                "CONDFT_CACHE to a folder that can be written, or to off",
                stacklevel=2,
            )

    def _warn(self, path: Path, reason: str) -> None:
        """Warns of an unusable entry, once per entry."""
        if path not in self._warned:
            self._warned.add(path)
            warnings.warn(f"cache entry {path} is ignored and will be rewritten: {reason}", stacklevel=2)


def _add_rows(
    cached: CachedRows, report: SpectralReport, infos: Mapping[str, UnitInfo], digests: Mapping[str, str]
) -> bool:
    """Adds the rows of the units that have the same name and digest; returns whether anything was new."""
    grown = False
    for row in report.rows:
        # The digest covers the unit's own shape, not the matrix that it was analyzed as.
        if digests.get(row.name) == row.digest and row.matrix_shape == infos[row.name].matrix_shape:
            before = cached.rows.get(row.name)
            cached.rows[row.name] = row_for_unit(row, infos[row.name]) if before is None else merged_row(before, row)
            grown |= cached.rows[row.name] != before
    return grown


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed since the folder was listed
        return 0.0


def _structure_hash(infos: Mapping[str, UnitInfo]) -> str:
    # Sorted, so that the order of the modules does not count.
    return _hash(sorted(f"{info.name} {info.shape} {info.dtype}" for info in infos.values()))[:8]


def _content_hash(digests: Mapping[str, str]) -> str:
    return _hash(sorted(f"{name} {digest}" for name, digest in digests.items()))


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_name(label: str) -> str:
    """The last part of a path, hub id or class name, with the characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", Path(label).name).strip("._")[:60] or "model"
