"""One unit -> one row of a report: what is known of a unit without its values, what its row costs, and the row.

A row is measured by `measure` (one unit) or `measure_batch` (units of one shape in one call). `row_for_unit` fits a
row of equal values, from a cache or another model, to a unit.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from condft.files.hashing import tensor_digest
from condft.report import Role, SpectralRow
from condft.spectra import (
    NonFiniteError,
    SpectralFacts,
    batched_facts,
    condition_number_bound,
    rounding_noise,
    spectral_facts,
)
from condft.spectra.routes import EIGEN_UP_TO, NEARLY_SQUARE, PROVEN_UP_TO, SMALL, Measures
from condft.weights.unit import Unit, load_ahead

__all__ = [
    "ALGORITHM_VERSION",
    "RTOL",
    "MeasureSpec",
    "UnitInfo",
    "digest_units",
    "lower_bound",
    "measure",
    "measure_batch",
    "merged_row",
    "row_for_unit",
]

# Raise it when the same weight gets figures that differ from before by more than rounding (a route, a tolerance or a
# formula changed), or when a model gets other units. Rows in caches are then measured again.
ALGORITHM_VERSION = 4

# Relative error that is asked of the condition number; see `condft.spectra.spectral_facts`.
RTOL = 1e-3

# Costs in flops of an fp32 matrix product, fitted to measured times (see `UnitInfo.cost`). A step of Lanczos is
# limited by memory bandwidth, so each entry counts for more than its flops. A factorization is slower than a product.
_OVERHEAD = 5e7
_LANCZOS_PER_ENTRY = 60  # of a Gram matrix
_LANCZOS_PER_ENTRY_OF_LARGE = 400  # of a square that has none
_EIGENVALUES = 17  # n^3
_FACTOR_AND_PROOFS = 1.5  # n^3


@dataclass(frozen=True)
class MeasureSpec:
    """What a row must hold.

    Attributes:
        measures: "basic" or "all".
        spectrum: Whether all singular values are kept too.
    """

    measures: Measures = "basic"
    spectrum: bool = False

    def satisfied_by(self, row: SpectralRow) -> bool:
        """Whether the row holds all that is asked for; it may hold more."""
        return (self.measures == "basic" or row.log_volume is not None) and not (
            self.spectrum and row.spectrum is None
        )

    def trimmed(self, row: SpectralRow) -> SpectralRow:
        """The row without what was not asked for, so that a report does not depend on what the cache held."""
        if self.measures == "basic":
            row = replace(row, log_volume=None, entropy_deficit=None)
        return row if self.spectrum else replace(row, spectrum=None)


@dataclass(frozen=True)
class UnitInfo:
    """A unit without its values: what other processes and the cache need to know about it.

    Attributes:
        name, shape, module_type, role, rounding_error, collective: As in `condft.weights.unit.Unit`.
        matrix_shape: Rows and columns of the matrix to analyze.
        dtype: Of the values, such as "bfloat16".
    """

    name: str
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    dtype: str
    module_type: str
    role: Role
    rounding_error: float | None
    collective: bool

    @classmethod
    def of(cls, unit: Unit) -> "UnitInfo":
        """The description of a unit."""
        rows, columns = unit.matrix.shape
        dtype = str(unit.tensor.dtype).removeprefix("torch.")
        shape = tuple(unit.tensor.shape)
        return cls(
            unit.name, shape, (rows, columns), dtype, unit.module_type, unit.role, unit.rounding_error, unit.collective
        )

    @property
    def num_parameters(self) -> int:
        """Number of entries."""
        return self.matrix_shape[0] * self.matrix_shape[1]

    def cost(self, spec: MeasureSpec) -> float:
        """Estimated time of the row, in flops that a matrix product does in that time. The shape predicts the route.

        Measured on one core, fp32, Gaussian matrices from 192x576 to 14336x4096: one unit of cost takes between 13
        and 33 ps on a busy machine. That is good enough to balance processes and to drive a progress bar.
        """
        n, m = sorted(self.matrix_shape)
        if spec.spectrum or n <= SMALL:
            return _OVERHEAD / 2 + 8 * m * n * n
        if n <= EIGEN_UP_TO:
            return _OVERHEAD / 2 + 2 * m * n * n + _EIGENVALUES * n**3
        around = _OVERHEAD + _LANCZOS_PER_ENTRY * n * n
        certified = m * n * n + _FACTOR_AND_PROOFS * n**3  # half the products of W^T W; its factor and two proofs
        if m == n:  # up to PROVEN_UP_TO a Gram matrix in double precision, beyond that the LU factors
            large = _OVERHEAD + _LANCZOS_PER_ENTRY_OF_LARGE * n * n + 4 / 3 * n**3
            return around + 2 * certified if n <= PROVEN_UP_TO else large
        if n <= NEARLY_SQUARE * m:
            return around + certified
        return around + (2 * certified if m >= 2 * n else 6 * m * n * n)  # a Gram matrix in double precision, or QR


def measure(unit: Unit, spec: MeasureSpec, digest: str | None = None) -> SpectralRow | None:
    """The row of a unit whose values are in memory; None if it holds NaN or infinity.

    Args:
        unit: The unit.
        spec: What the row must hold.
        digest: The unit's digest if it is known already.
    """
    # A spectrum takes an SVD, which gives the other measures at no extra cost.
    measures: Measures = "all" if spec.spectrum else spec.measures
    try:
        facts = spectral_facts(unit.matrix, measures=measures, rtol=RTOL, spectrum=spec.spectrum)
    except NonFiniteError:
        return None
    return _row(unit, facts, digest)


def measure_batch(units: Sequence[Unit], spec: MeasureSpec, digests: Sequence[str | None]) -> list[SpectralRow | None]:
    """`measure` for several units of one shape at once; `condft.spectra.batched_facts` says which units may go."""
    if spec.spectrum:  # no batched route keeps a spectrum
        return [measure(unit, spec, digest) for unit, digest in zip(units, digests, strict=True)]
    results = batched_facts([unit.matrix for unit in units], measures=spec.measures, rtol=RTOL)
    return [
        None if facts is None else _row(unit, facts, digest)
        for unit, facts, digest in zip(units, results, digests, strict=True)
    ]


def _row(unit: Unit, facts: SpectralFacts, digest: str | None) -> SpectralRow:
    info = UnitInfo.of(unit)
    row = SpectralRow(
        name=unit.name,
        shape=info.shape,
        matrix_shape=info.matrix_shape,
        dtype=info.dtype,
        num_parameters=info.num_parameters,
        module_type=unit.module_type,
        role=unit.role,
        digest=tensor_digest(unit.tensor) if digest is None else digest,
        noise_floor=0.0,  # `row_for_unit` fills in this one and the next
        resolved=False,
        **vars(facts),
    )
    return row_for_unit(row, info)


def lower_bound(unit: Unit, steps: int) -> float | None:
    """A certified lower bound of the condition number from `steps` products; None if it holds NaN or infinity."""
    try:
        return condition_number_bound(unit.matrix, max_steps=steps)
    except NonFiniteError:
        return None


def row_for_unit(row: SpectralRow, info: UnitInfo) -> SpectralRow:
    """A row of equal values, fitted to this unit: its type, its role, and the noise floor of its storage.

    The row may come from another model. There the same values may have another role, or they may be stored as
    bfloat16 where this unit is dequantized from 4 bits: rounding noise then has another size.
    """
    precision = getattr(torch, info.dtype) if info.rounding_error is None else info.rounding_error
    noise_floor = rounding_noise(info.matrix_shape, precision, row.frobenius_norm)
    resolved = row.sigma_min > noise_floor
    return replace(row, module_type=info.module_type, role=info.role, noise_floor=noise_floor, resolved=resolved)


def merged_row(row: SpectralRow, earlier: SpectralRow | None) -> SpectralRow:
    """A row, with the measures that it lacks taken from an earlier row of the same unit."""
    if earlier is None:
        return row
    if row.log_volume is None:
        row = replace(row, log_volume=earlier.log_volume, entropy_deficit=earlier.entropy_deficit)
    return replace(row, spectrum=earlier.spectrum) if row.spectrum is None else row


def digest_units(units: Iterable[Unit]) -> dict[str, str]:
    """Name -> digest of every unit. Values in memory are hashed in threads, since hashing releases the GIL."""
    in_memory: list[Unit] = []
    deferred: list[Unit] = []
    for unit in units:
        (in_memory if unit.deferred is None else deferred).append(unit)
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="condft-hash") as pool:
        hashes = pool.map(lambda unit: tensor_digest(unit.tensor), in_memory)
        digests = dict(zip([unit.name for unit in in_memory], hashes, strict=True))
    # One after another: in threads, several weights would be in memory at once.
    return digests | {unit.name: tensor_digest(unit.tensor) for unit in load_ahead(deferred)}
