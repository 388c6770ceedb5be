"""One unit -> one row of a report: what is known of a unit without its values, what its row costs, and the row."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from condft.files.hashing import tensor_digest
from condft.report import Role, SpectralRow
from condft.spectra import (
    Measures,
    NonFiniteError,
    SpectralFacts,
    batched_facts,
    condition_number_bound,
    rounding_noise,
    spectral_facts,
)
from condft.spectra.routes import EIGEN_UP_TO, NEARLY_SQUARE, PROVEN_UP_TO, SMALL
from condft.weights.unit import Unit, load_ahead

__all__ = [
    "ALGORITHM_VERSION",
    "RTOL",
    "MeasureSpec",
    "UnitInfo",
    "adopted",
    "completed",
    "digest_units",
    "lower_bound",
    "measure",
    "measure_together",
]

# Raise it whenever the same weight would get other figures than before by more than rounding (a route, a tolerance or
# a formula changed), or other units: rows in caches are then measured again.
ALGORITHM_VERSION = 4

# What is asked of κ; see `condft.spectra.spectral_facts`.
RTOL = 1e-3

# Costs in flops of a fp32 matrix product, fitted to measured times (see `UnitInfo.cost`). A step of Lanczos waits for
# memory, so that an entry costs more than the flops that it takes part in; a factorization is slower than a product.
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
        spectrum: All singular values too.
    """

    measures: Measures = "basic"
    spectrum: bool = False

    def satisfied_by(self, row: SpectralRow) -> bool:
        return (self.measures == "basic" or row.log_volume is not None) and not (
            self.spectrum and row.spectrum is None
        )

    def trimmed(self, row: SpectralRow) -> SpectralRow:
        """The row without what was not asked for, so that a report does not depend on what a cache had."""
        if self.measures == "basic":
            row = replace(row, log_volume=None, entropy_deficit=None)
        return row if self.spectrum else replace(row, spectrum=None)


@dataclass(frozen=True)
class UnitInfo:
    """A unit without its values: what other processes and the cache need to know of it.

    Attributes:
        name, shape, module_type, role, collective: As of `condft.weights.unit.Unit`.
        matrix_shape: Rows and columns of the matrix to analyze.
        dtype: Of the values, such as "bfloat16".
        rounding_error: As of `condft.weights.unit.Unit`.
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
        rows, columns = unit.matrix.shape
        dtype = str(unit.tensor.dtype).removeprefix("torch.")
        shape = tuple(unit.tensor.shape)
        return cls(
            unit.name, shape, (rows, columns), dtype, unit.module_type, unit.role, unit.rounding_error, unit.collective
        )

    @property
    def num_parameters(self) -> int:
        return self.matrix_shape[0] * self.matrix_shape[1]

    def cost(self, wanted: MeasureSpec) -> float:
        """Flops that a matrix product would do in the time that the row takes, with the route that shape suggests.

        Measured on one core, fp32 (Gaussian matrices from 192x576 to 14336x4096): the ratio of time to cost lies
        between 13 and 33 ps on a busy machine.
        """
        n, m = sorted(self.matrix_shape)
        if wanted.spectrum or n <= SMALL:
            return _OVERHEAD / 2 + 8 * m * n * n
        if n <= EIGEN_UP_TO:
            return _OVERHEAD / 2 + 2 * m * n * n + _EIGENVALUES * n**3
        around = _OVERHEAD + _LANCZOS_PER_ENTRY * n * n
        certified = m * n * n + _FACTOR_AND_PROOFS * n**3  # half the products of W^T W; its factor and two proofs
        if m == n:  # up to some size a Gram matrix in double precision, else the LU
            large = _OVERHEAD + _LANCZOS_PER_ENTRY_OF_LARGE * n * n + 4 / 3 * n**3
            return around + 2 * certified if n <= PROVEN_UP_TO else large
        if n <= NEARLY_SQUARE * m:
            return around + certified
        return around + (2 * certified if m >= 2 * n else 6 * m * n * n)  # in double precision, or a QR


def measure(unit: Unit, wanted: MeasureSpec, digest: str | None = None) -> SpectralRow | None:
    """The row of a unit whose values are in memory; None if it holds NaN or infinity.

    Args:
        unit: The unit.
        wanted: What the row must hold.
        digest: The unit's digest if it is known already.
    """
    # The SVD that a spectrum takes gives the other measures for nothing.
    measures: Measures = "all" if wanted.spectrum else wanted.measures
    try:
        facts = spectral_facts(unit.matrix, measures=measures, rtol=RTOL, spectrum=wanted.spectrum)
    except NonFiniteError:
        return None
    return _row(unit, facts, digest)


def measure_together(
    units: Sequence[Unit], wanted: MeasureSpec, digests: Sequence[str | None]
) -> list[SpectralRow | None]:
    """What `measure` says of each, in batched calls; see `condft.spectra.batched_facts` for which units may go."""
    if wanted.spectrum:
        return [measure(unit, wanted, digest) for unit, digest in zip(units, digests, strict=True)]
    found = batched_facts([unit.matrix for unit in units], measures=wanted.measures, rtol=RTOL)
    return [
        None if facts is None else _row(unit, facts, digest)
        for unit, facts, digest in zip(units, found, digests, strict=True)
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
        noise_floor=0.0,
        resolved=False,
        **vars(facts),
    )
    return adopted(row, info)


def lower_bound(unit: Unit, steps: int) -> float | None:
    """A certified lower bound of the condition number from a few products; None if the unit holds NaN or infinity."""
    try:
        return condition_number_bound(unit.matrix, max_steps=steps)
    except NonFiniteError:
        return None


def adopted(row: SpectralRow, info: UnitInfo) -> SpectralRow:
    """A row of the same values as the row of this unit: with what depends on where the values stand.

    The same values may be another model's: dequantized here and stored like that there, say.
    """
    precision = getattr(torch, info.dtype) if info.rounding_error is None else info.rounding_error
    noise_floor = rounding_noise(info.matrix_shape, precision, row.frobenius_norm)
    resolved = row.sigma_min > noise_floor
    return replace(row, module_type=info.module_type, role=info.role, noise_floor=noise_floor, resolved=resolved)


def completed(row: SpectralRow, known: SpectralRow | None) -> SpectralRow:
    """A new row with what an earlier one of the same unit holds beyond it."""
    if known is None:
        return row
    if row.log_volume is None:
        row = replace(row, log_volume=known.log_volume, entropy_deficit=known.entropy_deficit)
    return replace(row, spectrum=known.spectrum) if row.spectrum is None else row


def digest_units(units: Iterable[Unit]) -> dict[str, str]:
    """Name -> digest of every unit; on torch's number of threads for those in memory (hashing releases the GIL)."""
    here: list[Unit] = []
    elsewhere: list[Unit] = []
    for unit in units:
        (here if unit.deferred is None else elsewhere).append(unit)
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="condft-hash") as pool:
        digests = dict(zip([u.name for u in here], pool.map(lambda u: tensor_digest(u.tensor), here), strict=True))
    return digests | {unit.name: tensor_digest(unit.tensor) for unit in load_ahead(elsewhere)}
