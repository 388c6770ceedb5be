"""`SpectralReport`: what an analysis found, one row a unit, as a versioned JSON file. Standard library only."""

import base64
import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from condft.files.atomic import write_json

__all__ = ["REPORT_VERSION", "Role", "ScreenedUnit", "SkipReason", "SkippedWeight", "SpectralReport", "SpectralRow"]

REPORT_VERSION = 4
BOUND_FROM = 1e-2  # relative error from which a condition number is a lower bound; condft.spectra.facts has the same


class Role(StrEnum):
    """What a unit is for. LAYER and EXPERT are candidates for training, others only where they are asked for."""

    LAYER = "layer"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    OUTPUT_HEAD = "output_head"
    ROUTER = "router"
    PARAMETER = "parameter"  # a bare tensor of a module of no known layer kind


class SkipReason(StrEnum):
    """Why a tensor has no row."""

    FEWER_THAN_TWO_DIMENSIONS = "fewer_than_two_dimensions"
    TIED = "tied"
    META_DEVICE = "meta_device"
    NOT_FLOATING = "not_floating"
    EMPTY = "empty"
    ADAPTER = "adapter"
    NOT_REQUESTED = "not_requested"
    NON_FINITE = "non_finite"
    QUANTiZED = "quantized"
    NOT_SPLIT = "not_split"  # an attention weight that stays one unit though heads were asked for


@dataclass(frozen=True)
class SpectralRow:
    """One unit's spectral facts; see `condft.spectra.SpectralFacts` for the formulas.

    Attributes:
        name: Parameter name in the live model, with `[i]` appended for slice i of a stack.
        shape: The unit's own shape (a slice's, not the stack's).
        matrix_shape: Rows and columns of the matrix that was analyzed: `(out, in * kernel)` for a convolution.
        dtype: Storage dtype, such as `bfloat16`.
        num_parameters: Number of entries.
        module_type: The module's path with every layer index replaced by `*`; units are compared within it.
        role: What the unit is for.
        digest: XXH3-128 (32 hex digits) over dtype, shape and bytes of the unit (`condft.files.hashing`).
        sigma_max: Largest singular value.
        sigma_min: Smallest one.
        condition_number: Their ratio, in `[1, inf]`.
        frobenius_norm: Root of the sum of squared entries.
        stable_rank: `frobenius_norm**2 / sigma_max**2`.
        log_volume: Sum of log singular values, nats; None if it was not measured.
        entropy_deficit: Nats lost against equal singular values of the same Frobenius norm; None if it was not
            measured.
        relative_error: What the route vouches for: an estimate of the relative error of `condition_number`.
        noise_floor: Spectral norm that rounding to the storage dtype, or to the codes of a quantized weight, has.
        resolved: Whether `sigma_min` lies above it; if not, the condition number may be the rounding's.
        method: The route that found the figures (see `condft.spectra.routes`).
        spectrum: All singular values in descending order, each a fp32 number; None if they were not asked for.
        fisher_information: Mean over the unit's entries of the Fisher information's diagonal, a token of the model's
            own text; None if it was not measured (see `condft.add_fisher_information`). No fact of the spectrum; the
            same weight has another in another model.
    """

    name: str
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    dtype: str
    num_parameters: int
    module_type: str
    role: Role
    digest: str
    sigma_max: float
    sigma_min: float
    condition_number: float
    frobenius_norm: float
    stable_rank: float
    log_volume: float | None
    entropy_deficit: float | None
    relative_error: float
    noise_floor: float
    resolved: bool
    method: str
    spectrum: tuple[float, ...] | None = None
    fisher_information: float | None = None

    @property
    def is_lower_bound(self) -> bool:
        """Whether `condition_number` is a lower bound, not a figure: see `condft.spectra.SpectralFacts`."""
        return math.isfinite(self.condition_number) and self.relative_error > BOUND_FROM


@dataclass(frozen=True)
class SkippedWeight:
    """A tensor without a row, and why."""

    name: str
    shape: tuple[int, ...]
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True)
class ScreenedUnit:
    """A unit ruled out without exact figures: its condition number is at least `condition_number_bound`."""

    name: str
    shape: tuple[int, ...]
    num_parameters: int
    module_type: str
    role: Role
    condition_number_bound: float


@dataclass(frozen=True)
class SpectralReport:
    """Rows sorted by name, and everything that was left out with its reason.

    Attributes:
        rows: One `SpectralRow` a unit, sorted by name.
        skipped: One `SkippedWeight` a tensor without a row, sorted by name.
        model: Where the weights came from, for people (a path, a hub id or a class name).
        versions: Versions of what computed it.
        measures: "basic", or "all" if the rows hold log-volume and entropy deficit.
        screened: Units that `keep_lowest` ruled out, sorted by name; empty for a whole analysis.
    """

    rows: tuple[SpectralRow, ...]
    skipped: tuple[SkippedWeight, ...] = ()
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    measures: str = "all"
    screened: tuple[ScreenedUnit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.name)))
        object.__setattr__(self, "skipped", tuple(sorted(self.skipped, key=lambda skip: skip.name)))
        object.__setattr__(self, "screened", tuple(sorted(self.screened, key=lambda unit: unit.name)))
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"a report has one row a unit, but these names occur more than once: {twice[:5]}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the analyzed weights (their names and digests), independent of order and of rounding."""
        text = "\n".join(f"{row.name} {row.digest}" for row in self.rows)
        return hashlib.sha256(text.encode()).hexdigest()

    def row(self, name: str) -> SpectralRow:
        """The row of that name.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no unit named {name!r} among the {len(self.rows)} rows of this report")

    def restricted(self, names: Iterable[str]) -> "SpectralReport":
        """The same report with only the named rows (unknown names are ignored)."""
        wanted = set(names)
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row.name in wanted))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the infinities of a rank-deficient unit become the strings "inf" and "-inf"."""
        return {
            "format": "condft.SpectralReport",
            "version": REPORT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "versions": self.versions,
            "measures": self.measures,
            "rows": [_to_json(row) for row in self.rows],
            "skipped": [_to_json(skip) for skip in self.skipped],
            "screened": [_to_json(unit) for unit in self.screened],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: Another format or version, missing or unknown fields, or a fingerprint that does not
                belong to the rows.
        """
        if value.get("format") != "condft.SpectralReport":
            raise ValueError(f"not a spectral report: its format is {value.get('format')!r}")
        if value.get("version") != REPORT_VERSION:
            raise ValueError(
                f"the report has version {value.get('version')!r}, this condft reads version {REPORT_VERSION}: "
                "analyze the model again"
            )
        try:
            rows = tuple(_row_from_json(row) for row in value["rows"])
            skipped = tuple(
                SkippedWeight(s["name"], tuple(s["shape"]), SkipReason(s["reason"]), s.get("detail", ""))
                for s in value["skipped"]
            )
            screened = tuple(
                ScreenedUnit(
                    **{
                        **unit,
                        "shape": tuple(unit["shape"]),
                        "role": Role(unit["role"]),
                        "condition_number_bound": float(unit["condition_number_bound"]),
                    }
                )
                for unit in value["screened"]
            )
            report = cls(rows, skipped, value["model"], value["versions"], value["measures"], screened)
            claimed = value["fingerprint"]
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ValueError(f"the report is damaged: {error!r}") from error
        if report.fingerprint != claimed:
            raise ValueError("the report is damaged: its fingerprint does not belong to its rows")
        return report

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a report written by `save`.

        Raises:
            FileNotFoundError: No such file.
            IsADirectoryError: A folder.
            ValueError: Not JSON, or not a report of this version.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: not a spectral report: the file holds a {type(value).__name__}")
        try:
            return cls.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _to_json(item: SpectralRow | SkippedWeight | ScreenedUnit) -> dict[str, Any]:
    """Strict JSON has no infinity, and `null` says "not measured": the infinities become strings.

    A spectrum is thousands of numbers: it is kept as the base64 of little-endian fp32.
    """
    fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    if fields.get("spectrum") is not None:
        fields["spectrum"] = _packed(fields["spectrum"])
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else value for key, value in fields.items()
    }


def _packed(values: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def _unpacked(text: str) -> tuple[float, ...]:
    raw = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


_FLOATS = tuple(f.name for f in dataclasses.fields(SpectralRow) if f.type is float)
_MAYBE_FLOATS = tuple(f.name for f in dataclasses.fields(SpectralRow) if f.type == float | None)


def _row_from_json(value: dict[str, Any]) -> SpectralRow:
    rows, columns = value["matrix_shape"]
    converted = {
        **{key: float(value[key]) for key in _FLOATS},
        **{key: None if value[key] is None else float(value[key]) for key in _MAYBE_FLOATS},
        "shape": tuple(value["shape"]),
        "matrix_shape": (int(rows), int(columns)),
        "role": Role(value["role"]),
        "spectrum": None if value["spectrum"] is None else _unpacked(value["spectrum"]),
    }
    return SpectralRow(**{**value, **converted})
