"""`SpectralReport`: what an analysis found, one row a unit, as a versioned JSON file. Neither torch nor numpy."""

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, overload

from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from condft.files.atomic import write_json

__all__ = ["REPORT_VERSION", "Role", "ScreenedUnit", "SkipReason", "SkippedWeight", "SpectralReport", "SpectralRow"]

REPORT_VERSION = 4  # raise it with every change of the fields: files of another version are refused
BOUND_FROM = 1e-2  # relative error from which a condition number is a lower bound; condft.spectra.facts has the same

_FORMAT = "condft.SpectralReport"


def _strict(value: float) -> float | str:
    """Strict JSON has no infinity, and `null` means "not measured": a rank-deficient unit's become strings."""
    return str(value) if math.isinf(value) else value


def _packed(values: tuple[float, ...] | None) -> str | None:
    """A spectrum is thousands of numbers: it is kept as the base64 of little-endian fp32."""
    return None if values is None else base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def _unpacked(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    raw = base64.b64decode(text, validate=True)
    if len(raw) % 4:
        raise ValueError(f"{len(raw)} bytes are no whole number of fp32 values")
    return struct.unpack(f"<{len(raw) // 4}f", raw)


# How the fields of a row go to JSON and come back; in Python they are plain floats and a plain tuple.
Figure = Annotated[float, PlainSerializer(_strict)]
Spectrum = Annotated[tuple[float, ...] | None, PlainValidator(_unpacked), PlainSerializer(_packed)]
# A field that this version does not know would be lost when the report is written again: it is an error.
_NO_OTHER_FIELDS = ConfigDict(extra="forbid")


class Role(StrEnum):
    """What a unit is for. LAYER and EXPERT are candidates for training; the others train only if they are named."""

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
    QUANTIZED = "quantized"
    NOT_SPLIT = "not_split"  # an attention weight that stays one unit though heads were asked for

    @classmethod
    def _missing_(cls, value: object) -> "SkipReason | None":
        # Reports and cache entries that were written before the spelling changed must still load.
        return cls.QUANTIZED if value == "quantised" else None


@dataclass(frozen=True)
class SpectralRow:
    """The spectral facts of one unit; `condft.spectra.SpectralFacts` gives the formulas.

    Attributes:
        name: Parameter name in the live model. A unit that is a part of a weight has the part appended: `[3]` for
            entry 3 of a stack, `[h3]` for attention head 3.
        shape: Shape of the unit itself: for a part, not that of the whole weight.
        matrix_shape: Rows and columns of the matrix that was analyzed: `(out, in * kernel)` for a convolution.
        dtype: Storage dtype, such as `bfloat16`.
        num_parameters: Number of entries.
        module_type: Path of the module with every layer index replaced by `*`. Units are compared within it.
        role: What the unit is for.
        digest: XXH3-128 (32 hex digits) over dtype, shape and bytes of the unit (`condft.files.hashing`).
        sigma_max: Largest singular value.
        sigma_min: Smallest singular value.
        condition_number: `sigma_max / sigma_min`, in `[1, inf]`.
        frobenius_norm: Square root of the sum of squared entries.
        stable_rank: `frobenius_norm**2 / sigma_max**2`.
        log_volume: Sum of the logs of the singular values, nats; None if it was not measured.
        entropy_deficit: Nats lost compared with equal singular values of the same Frobenius norm; None if it was not
            measured.
        relative_error: An estimate of the relative error of `condition_number`, from the route that found it.
        noise_floor: Spectral norm of the rounding to the storage dtype, or to the codes of a quantized weight.
        resolved: Whether `sigma_min` is above the noise floor. If not, the condition number may come from rounding.
        method: The route that found the figures (see `condft.spectra.routes`).
        spectrum: All singular values in descending order, each a fp32 number; None if they were not asked for.
        fisher_information: Diagonal of the Fisher information, the mean over the unit's entries, per token of text
            sampled from the model; None if it was not measured (see `condft.add_fisher_information`). It is no fact
            of the spectrum: the same weight has another one in another model.

    >>> row = report["model.layers.0.self_attn.q_proj.weight"]
    >>> row.shape, row.role.value, row.module_type
    ((32, 32), 'layer', 'model.layers.*.self_attn.q_proj')
    """

    __pydantic_config__ = _NO_OTHER_FIELDS

    name: str
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    dtype: str
    num_parameters: int
    module_type: str
    role: Role
    digest: str
    sigma_max: Figure
    sigma_min: Figure
    condition_number: Figure
    frobenius_norm: Figure
    stable_rank: Figure
    log_volume: Figure | None
    entropy_deficit: Figure | None
    relative_error: Figure
    noise_floor: Figure
    resolved: bool
    method: str
    spectrum: Spectrum = None
    fisher_information: Figure | None = None

    @property
    def is_lower_bound(self) -> bool:
        """Whether `condition_number` is a lower bound, not a figure: see `condft.spectra.SpectralFacts`."""
        return math.isfinite(self.condition_number) and self.relative_error > BOUND_FROM


@dataclass(frozen=True)
class SkippedWeight:
    """A tensor without a row, and the reason."""

    __pydantic_config__ = _NO_OTHER_FIELDS

    name: str
    shape: tuple[int, ...]
    reason: SkipReason
    detail: str = ""


@dataclass(frozen=True)
class ScreenedUnit:
    """A unit ruled out without exact figures: its condition number is at least `condition_number_bound`."""

    __pydantic_config__ = _NO_OTHER_FIELDS

    name: str
    shape: tuple[int, ...]
    num_parameters: int
    module_type: str
    role: Role
    condition_number_bound: Figure


@dataclass(frozen=True, repr=False)
class SpectralReport(Sequence[SpectralRow]):
    """What an analysis found: a sequence of rows, sorted by name, and everything that was left out with its reason.

    Attributes:
        rows: One `SpectralRow` a unit, sorted by name.
        skipped: One `SkippedWeight` a tensor without a row, sorted by name.
        model: Where the weights came from, for people (a path, a hub id or a class name).
        versions: Versions of the software that computed it.
        measures: "basic", or "all" if the rows hold log-volume and entropy deficit.
        screened: Units that `keep_lowest` ruled out, sorted by name; empty for a whole analysis.

    >>> len(report)
    29
    >>> lowest = min(report, key=lambda row: row.condition_number)
    >>> report[lowest.name] is lowest
    True
    >>> report.save("report.json")
    >>> SpectralReport.load("report.json") == report
    True
    """

    rows: tuple[SpectralRow, ...]
    skipped: tuple[SkippedWeight, ...] = ()
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    measures: str = "all"
    screened: tuple[ScreenedUnit, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.name)))  # the class is frozen
        object.__setattr__(self, "skipped", tuple(sorted(self.skipped, key=lambda skip: skip.name)))
        object.__setattr__(self, "screened", tuple(sorted(self.screened, key=lambda unit: unit.name)))
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"a report has one row a unit, but these names occur more than once: {twice[:5]}")

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return True  # a report without rows is still a report: `if report` asks whether there is one

    def __iter__(self) -> Iterator[SpectralRow]:
        return iter(self.rows)

    def __contains__(self, item: object) -> bool:
        return item in self._by_name if isinstance(item, str) else item in self.rows

    @overload
    def __getitem__(self, key: str | int) -> SpectralRow: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[SpectralRow, ...]: ...
    def __getitem__(self, key: str | int | slice) -> SpectralRow | tuple[SpectralRow, ...]:
        """The row of that name or at that place, or the rows of a slice.

        Raises:
            KeyError: No row has that name; the message names those that are nearest.
            IndexError: There is no such place.
        """
        if not isinstance(key, str):
            return self.rows[key]
        if key not in self._by_name:
            near = get_close_matches(key, self._by_name, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise KeyError(f"no unit named {key!r} among the {len(self)} rows of this report{hint}")
        return self._by_name[key]

    def __repr__(self) -> str:
        kappas = [row.condition_number for row in self.rows]
        spread = f", condition numbers {min(kappas):.3g} to {max(kappas):.3g}" if kappas else ""
        screened = f", {len(self.screened)} screened" if self.screened else ""
        name = f" of {self.model}" if self.model else ""
        return f"<SpectralReport{name}: {len(self)} units{spread}{screened}, {len(self.skipped)} weights skipped>"

    @cached_property  # it writes to __dict__, so it works in a frozen class
    def _by_name(self) -> dict[str, SpectralRow]:
        return {row.name: row for row in self.rows}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the analyzed weights (their names and digests), independent of order and of rounding."""
        text = "\n".join(f"{row.name} {row.digest}" for row in self.rows)
        return hashlib.sha256(text.encode()).hexdigest()

    def restricted(self, names: Iterable[str]) -> "SpectralReport":
        """The same report with only the named rows (unknown names are ignored)."""
        kept = set(names)
        return replace(self, rows=tuple(row for row in self.rows if row.name in kept))

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`: the index is the name, each other field a column.

        Raises:
            ImportError: pandas is not installed.

        >>> table = report.to_pandas()
        >>> table.groupby("role")["condition_number"].median().index.to_list()
        ['embedding', 'layer']
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas. Without it, "
                "[dataclasses.asdict(row) for row in report] holds the same values."
            ) from error
        rows = [{**asdict(row), "role": str(row.role)} for row in self.rows]
        return pandas.DataFrame(rows, columns=list(SpectralRow.__dataclass_fields__)).set_index("name")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the infinities of a rank-deficient unit become the strings "inf" and "-inf"."""
        content = _File(
            self.model, self.fingerprint, self.versions, self.measures, self.rows, self.skipped, self.screened
        )
        return {"format": _FORMAT, "version": REPORT_VERSION, **_FILE.dump_python(content, mode="json")}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: Another format or version, missing, unknown or wrong fields (the message names the first), or
                a fingerprint that does not belong to the rows.
        """
        content = dict(value)
        if (name := content.pop("format", None)) != _FORMAT:
            raise ValueError(f"not a spectral report: its format is {name!r}")
        if (version := content.pop("version", None)) != REPORT_VERSION:
            raise ValueError(
                f"the report has version {version!r}, this condft reads version {REPORT_VERSION}: "
                "analyze the model again"
            )
        try:
            file = _FILE.validate_python(content)
            report = cls(file.rows, file.skipped, file.model, file.versions, file.measures, file.screened)
            if report.fingerprint != file.fingerprint:  # rows were changed after they had been written
                raise ValueError("its fingerprint does not belong to its rows")
        except ValueError as error:  # pydantic's is one
            problem = _first_problem(error) if isinstance(error, ValidationError) else error
            raise ValueError(f"the report is damaged: {problem}. Analyze the model again.") from error
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


@dataclass(frozen=True)
class _File:
    """What a file holds after its format and version, in this order."""

    __pydantic_config__ = _NO_OTHER_FIELDS

    model: str
    fingerprint: str
    versions: dict[str, str]
    measures: str
    rows: tuple[SpectralRow, ...]
    skipped: tuple[SkippedWeight, ...]
    screened: tuple[ScreenedUnit, ...]


_FILE = TypeAdapter(_File)


def _first_problem(error: ValidationError) -> str:
    """Such as `rows[3].sigma_max: Field required (and 2 more)`."""
    problems = error.errors(include_url=False, include_input=False)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problems[0]["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place.removeprefix('.')}: {problems[0]['msg']}{more}"
