r"""Spectral facts of one matrix without its full SVD: which route, and whether its answer may stand.

Routes, cheapest first; each states the error that it vouches for, and the next one takes over where that is too much:

- `gram`: for rectangles: the Cholesky factor of `W^T W` in single precision, Golub-Kahan-Lanczos on it and on its
  inverse, and the proof by two more Cholesky factorisations that nothing lies beyond the two ends.
- `cholesky`: the same in double precision, where the condition number or the log-volume asks for it.
- `qr`: the triangular factor of a tall matrix in fp64, then as before; past a condition number of 1e6, where a Gram
  matrix no longer tells, what two start vectors agree on.
- `lu`: for squares, whose smallest singular value hides at the hard edge of the spectrum: LU of W in fp64, then
  the process on its inverse, from two start vectors.
- `svd`: all singular values in fp64: small matrices, and condition numbers past 1e12.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from condft.spectra.factor import cholesky_factor, eigenvalues_above, eigenvalues_below, gram_matrix, qr_factor
from condft.spectra.lanczos import Ends, golub_kahan
from condft.spectra.operators import Inverse, MatrixProducts, Products, TriangularInverse
from condft.spectra.reference import singular_values

__all__ = [
    "Measures",
    "NonFiniteError",
    "SpectralFacts",
    "condition_number",
    "condition_number_bound",
    "spectral_facts",
]

Measures = Literal["basic", "all"]

_SMALL = 48  # up to here an SVD costs less than the overhead of anything else
_SINGLE_FROM = 256  # up to here a Gram matrix costs little in either precision
_NEARLY_SQUARE = 0.8  # aspect n / m above which the lower edge closes in, so that single precision cannot tell it
_STARTS = 4
_PROVEN_UP_TO = 1024  # order of a square whose upper end gets a proof: there it costs a third of the LU
# Rounding moves sigma_n^2 by this times eps * sigma_1^2. Measured: 0.7 and less up to 30,000 rows; but m / 1300 where
# entries are stored in a narrower dtype than they are summed in.
_GRAM_ROUNDING = 1.0
_GRAM_ROUNDING_NARROW = 1 / 500
_MAX_STEPS = 160
BOUND_FROM = 1e-2  # relative error from which the condition number is reported as a lower bound
_EPS64 = torch.finfo(torch.float64).eps


class NonFiniteError(ValueError):
    """A matrix holds NaN or infinity, so it has no spectrum."""


@dataclass(frozen=True)
class SpectralFacts:
    r"""What a spectrum says, with $n = \min(m, k)$ singular values.

    Attributes:
        sigma_max: Largest singular value.
        sigma_min: Smallest of the n; 0 for a numerically rank-deficient matrix.
        condition_number: sigma_max / sigma_min in `[1, inf]`; `inf` if rank-deficient or zero.
        frobenius_norm: $\sqrt{\sum \sigma_i^2}$.
        stable_rank: $\sum \sigma_i^2 / \sigma_1^2$ in `[1, n]` (Rudelson & Vershynin 2007); 0 for a zero matrix.
        log_volume: $\sum \log \sigma_i$ in nats, the log of the factor by which the map scales n-dimensional
            volume; `-inf` if rank-deficient; None if not measured.
        entropy_deficit: $\frac n2 \log(\frac1n \sum \sigma_i^2) - \sum \log \sigma_i \ge 0$ in nats: how much
            less entropy the map passes on than the best-conditioned one of the same Frobenius norm (AM-GM
            inequality on $\sigma_i^2$); 0 only for equal singular values, `inf` if rank-deficient; None if not
            measured.
        relative_error: What the route vouches for: the relative error of `condition_number`, at most. It is proven
            by inertia for `gram`, `cholesky` and `qr` (to rounding), the SVD's backward error for `svd`, and what
            independent start vectors agree on for `lu` and for `qr` past 1e6.
        method: The route that answered.
        spectrum: All singular values in descending order, to fp32; None if not asked for.
    """

    sigma_max: float
    sigma_min: float
    condition_number: float
    frobenius_norm: float
    stable_rank: float
    log_volume: float | None
    entropy_deficit: float | None
    relative_error: float
    method: str
    spectrum: tuple[float, ...] | None = None

    @property
    def is_lower_bound(self) -> bool:
        """Whether `condition_number` is a bound, not a figure: fp64 tells it no better than to 1e-2.

        It is then sigma_max / (sigma_min + d), where d is the possible error of sigma_min.
        """
        return math.isfinite(self.condition_number) and self.relative_error > BOUND_FROM


@dataclass(frozen=True)
class _Answer:
    """A route's result: the two ends, log |det| of the triangular factor if it has one, and a relative error of κ."""

    largest: float
    smallest: float
    log_volume: float | None
    error: float
    method: str
    values: Tensor | None = None


def spectral_facts(
    matrix: Tensor, *, measures: Measures = "basic", rtol: float = 1e-3, spectrum: bool = False
) -> SpectralFacts:
    r"""Spectral facts of one matrix (see `SpectralFacts`).

    A singular value under $\max(m, k) \cdot \varepsilon_{64} \cdot \sigma_1$ is below what fp64 resolves (Golub & Van
    Loan, §5.4.1) and counts as zero: the matrix is then numerically rank-deficient.

    Args:
        matrix: `(m, k)`, any floating dtype and device. Not modified. Extra memory is at most two `(n, n)` matrices
            and a block of rows.
        measures: "basic" leaves `log_volume` and `entropy_deficit` out: they need a factorisation.
        rtol: Relative accuracy asked of the condition number.
        spectrum: All singular values too, which takes the SVD.

    Returns:
        The facts. `condition_number`, `stable_rank` and `entropy_deficit` do not change under `W -> 2^k W`, bit for
        bit. The same matrix gives the same facts on the same device with the same number of threads.

    Raises:
        ValueError: Not a non-empty real matrix, or it holds NaN or infinity.
    """
    largest_entry = _checked(matrix)
    tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().mT
    if largest_entry == 0.0:
        no_volume, all_lost = (-math.inf, math.inf) if measures == "all" else (None, None)
        values = (0.0,) * tall.shape[1] if spectrum else None
        return SpectralFacts(0.0, 0.0, math.inf, 0.0, 0.0, no_volume, all_lost, 0.0, "zero", values)
    tall, exponent = _scaled(tall, largest_entry)
    answer = _by_svd(tall) if spectrum else _solve(tall, measures, rtol)
    return _facts(tall, answer, exponent, measures, spectrum=spectrum)


def condition_number(weight: Tensor, *, rtol: float = 1e-3) -> float:
    r"""Spectral condition number $\sigma_{\max}/\sigma_{\min}$ (Golub & Van Loan, §2.6.2).

    Args:
        weight: `(out_features, in_features)`, any floating dtype or device. Not modified.
        rtol: Relative accuracy asked for.

    Returns:
        A float in `[1, inf]`, `inf` for a numerically rank-deficient weight. Unchanged by `W -> cW`, `c != 0`.

    Raises:
        ValueError: Not a non-empty matrix, or it holds NaN or infinity.
    """
    return spectral_facts(weight, rtol=rtol).condition_number


def condition_number_bound(matrix: Tensor, *, above: float = math.inf, max_steps: int = 24) -> float:
    """A lower bound of the condition number from a few products: Ritz values lie within the spectrum.

    Args:
        matrix: As for `spectral_facts`.
        above: Stop as soon as the bound exceeds this.
        max_steps: Products to spend (and as many with the transpose).

    Returns:
        A number that the condition number is at least, less a margin for rounding.

    Raises:
        ValueError: As `spectral_facts`.
    """
    largest_entry = _checked(matrix)
    if largest_entry == 0.0:
        return math.inf
    tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().mT
    tall, _ = _scaled(tall, largest_entry)
    dtype = _lanczos_dtype(tall)
    products = MatrixProducts(tall, dtype)
    ends = golub_kahan(products, wanted="both", rtol=0.0, max_steps=max_steps, stop_above=above)
    # A computed Ritz value is off by a few eps * sigma_1; the bound is taken where it holds in spite of that.
    margin = 16 * torch.finfo(dtype).eps * ends.largest
    return max(1.0, (ends.largest - margin) / (ends.smallest + margin))


def _checked(matrix: Tensor) -> float:
    """The largest magnitude in the matrix, after the checks that every public function makes."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"expected a non-empty matrix, got a tensor of shape {tuple(matrix.shape)}")
    if not matrix.dtype.is_floating_point:
        raise ValueError(f"expected a real floating-point matrix, got dtype {matrix.dtype}")
    entries = matrix.detach()
    if entries.dtype.itemsize == 1:  # float8 has no arithmetic of its own
        entries = entries.to(torch.float32)
    # Some LAPACK builds return finite singular values for NaN input, so finiteness is tested here.
    lowest, highest = torch.aminmax(entries)
    largest = max(abs(float(lowest)), abs(float(highest)))
    if not math.isfinite(largest):
        count = int((~torch.isfinite(entries)).sum())
        raise NonFiniteError(f"the matrix holds NaN or infinity in {count:,} of {matrix.numel():,} entries")
    return largest


def _scaled(tall: Tensor, largest_entry: float) -> tuple[Tensor, int]:
    """The matrix, divided by a power of two if it is far from 1, so that squares neither over- nor underflow.

    The division is exact. Ordinary weights are left where they are: no copy is made.
    """
    if tall.dtype.itemsize == 1:
        tall = tall.to(torch.float32)
    exponent = math.frexp(largest_entry)[1]
    if abs(exponent) <= 12:
        return tall, 0
    exponent = max(exponent, -1000)  # 2**1000 is still a double; fp64 subnormals need no more
    wide = tall.to(torch.float64)
    scaled = torch.ldexp(wide, torch.tensor(-exponent, device=tall.device))
    return (scaled if tall.dtype == torch.float64 else scaled.to(torch.float32)), exponent


def _lanczos_dtype(tall: Tensor) -> torch.dtype:
    return torch.float64 if tall.dtype == torch.float64 else torch.float32


def _solve(tall: Tensor, measures: Measures, rtol: float) -> _Answer:
    """The first route whose error is within the tolerance."""
    m, n = tall.shape
    if n > _SMALL:
        for route in _routes(m, n, measures, tall.dtype):
            answer = route(tall, rtol)
            if answer is not None:
                return answer
    return _by_svd(tall)


def _routes(m: int, n: int, measures: Measures, dtype: torch.dtype) -> list[Callable[[Tensor, float], _Answer | None]]:
    if m == n:
        return [_by_lu]
    routes: list[Callable[[Tensor, float], _Answer | None]] = []
    # The log-volume sums n logarithms, so that it wants double precision; so do the edges of what is nearly square.
    if measures == "basic" and dtype != torch.float64 and _SINGLE_FROM < n <= _NEARLY_SQUARE * m:
        routes.append(partial(_by_gram, dtype=torch.float32, method="gram"))
    if m >= 2 * n:  # less tall: a QR costs hardly more, and holds at any condition number
        routes.append(partial(_by_gram, dtype=torch.float64, method="cholesky"))
    return [*routes, _by_qr]


def _by_svd(tall: Tensor) -> _Answer:
    values = singular_values(tall)
    largest, smallest = float(values[0]), float(values[-1])
    log_volume = float(values.log().sum()) if smallest > 0 else -math.inf
    # Each value is off by some eps * sigma_1 (Golub & Van Loan, section 8.6), which is eps * kappa of the smallest.
    error = max(tall.shape) * _EPS64 * (largest / smallest if smallest > 0 else math.inf)
    return _Answer(largest, smallest, log_volume, error, "svd", values)


def _by_gram(tall: Tensor, rtol: float, dtype: torch.dtype, method: str) -> _Answer | None:
    """The ends of the Cholesky factor of `W^T W`, if the condition number squared leaves them their digits."""
    narrow = tall.dtype.itemsize < dtype.itemsize
    constant = max(_GRAM_ROUNDING, _GRAM_ROUNDING_NARROW * tall.shape[0]) if narrow else _GRAM_ROUNDING
    return _certified(gram_matrix(tall, dtype), rtol, method, constant)


def _by_qr(tall: Tensor, rtol: float) -> _Answer | None:
    factor = qr_factor(tall)
    answer = _by_triangle(factor, rtol, "qr")
    if answer is None or _GRAM_ROUNDING * _squared(answer, torch.float64) > rtol / 5:
        return answer  # the Gram matrix could not tell: what two start vectors agree on has to do
    gram = gram_matrix(factor, torch.float64)
    del factor  # two (n, n) matrices at a time
    return _certified(gram, rtol, "qr")


def _by_lu(square: Tensor, rtol: float) -> _Answer | None:
    largest = _largest_of_square(square, rtol / 2)
    if largest is None:
        return None
    factors, pivots, info = torch.linalg.lu_factor_ex(square.to(torch.float64))
    if int(info):
        return None
    inverse = _agreed(Inverse(factors, pivots), rtol / 2)
    log_volume = float(factors.diagonal().abs().log().sum())
    return _from_inverse(largest, inverse, log_volume, square.shape[0], "lu", rtol)


def _largest_of_square(square: Tensor, rtol: float) -> Ends | None:
    """The upper end, proven where a Gram matrix is cheap beside the LU, else as two start vectors agree on it."""
    dtype = _lanczos_dtype(square)
    products = MatrixProducts(square, dtype)
    if square.shape[0] > _PROVEN_UP_TO:
        agreed = _agreed(products, rtol)
        return agreed if agreed.settled else None
    gram = gram_matrix(square, dtype)
    for start in range(_STARTS):
        ends = golub_kahan(products, wanted="largest", rtol=rtol, max_steps=_MAX_STEPS, start=start)
        if ends.settled and eigenvalues_below(gram, (ends.largest * (1 + rtol)) ** 2):
            return ends
    return None


def _certified(gram: Tensor, rtol: float, method: str, constant: float = _GRAM_ROUNDING) -> _Answer | None:
    """Both ends of a Gram matrix, with the proof that no other singular value lies beyond them.

    A start vector that hardly holds an end leads to a settled answer that is its neighbour; then the next one has a
    try. None where the squared condition number is too much for the precision.
    """
    width = 0.4 * rtol
    for start in range(_STARTS):
        factor = cholesky_factor(gram)
        answer = None if factor is None else _by_triangle(factor, rtol / 2, method, starts=(start,))
        del factor  # two (n, n) matrices at a time
        rounding = math.inf if answer is None else constant * _squared(answer, gram.dtype)
        if answer is None or rounding > rtol / 5:
            return None
        lower, upper = (answer.smallest * (1 - width)) ** 2, (answer.largest * (1 + width)) ** 2
        if eigenvalues_above(gram, lower) and eigenvalues_below(gram, upper):
            return dataclasses.replace(answer, error=2 * width + rounding)
    return None


def _squared(answer: _Answer, dtype: torch.dtype) -> float:
    """`eps kappa^2`: the unit of what rounding a Gram matrix does to the relative error of the smallest value."""
    return torch.finfo(dtype).eps * (answer.largest / answer.smallest) ** 2


def _by_triangle(factor: Tensor, rtol: float, method: str, starts: tuple[int, ...] = (0, 1)) -> _Answer | None:
    diagonal = factor.diagonal().abs()
    if not bool((diagonal > 0).all()):
        return None
    largest = _agreed(MatrixProducts(factor, factor.dtype), rtol / 2, starts)
    if not largest.settled:
        return None
    inverse = _agreed(TriangularInverse(factor), rtol / 2, starts)
    return _from_inverse(largest, inverse, float(diagonal.double().log().sum()), factor.shape[0], method, rtol)


def _agreed(products: Products, rtol: float, starts: tuple[int, ...] = (0, 1)) -> Ends:
    """The larger answer of some start vectors; where two differ, up to `_STARTS` of them, until two agree on it."""
    found = [golub_kahan(products, wanted="largest", rtol=rtol, max_steps=_MAX_STEPS, start=start) for start in starts]
    while len(starts) > 1:
        first, second = sorted(found, key=lambda ends: ends.largest)[-2:]
        if second.largest - first.largest <= rtol * second.largest:
            break
        if len(found) == _STARTS:
            return dataclasses.replace(second, settled=False)
        found.append(
            golub_kahan(products, wanted="largest", rtol=rtol, max_steps=_MAX_STEPS, start=starts[0] + len(found))
        )
    return max(found, key=lambda ends: ends.largest)


def _from_inverse(
    largest: Ends, inverse: Ends, log_volume: float, size: int, method: str, rtol: float
) -> _Answer | None:
    """Joins sigma_1 and 1 / sigma_1 of the inverse, both to `rtol / 2`; None past 1e12: the SVD is to decide."""
    if not inverse.settled or not 0.0 < inverse.largest < math.inf:
        return None
    smallest = 1.0 / inverse.largest
    if largest.largest / smallest > 1e12:
        return None
    rounding = size * _EPS64 * largest.largest / smallest
    return _Answer(largest.largest, smallest, log_volume, rtol + rounding, method)


def _facts(tall: Tensor, answer: _Answer, exponent: int, measures: Measures, *, spectrum: bool) -> SpectralFacts:
    n = tall.shape[1]
    row_norms = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in _norm_blocks(tall)])
    sum_of_squares = float(row_norms.double().square().sum())
    deficient = answer.smallest <= tall.shape[0] * _EPS64 * answer.largest
    log_volume = deficit = None
    if measures == "all":
        assert answer.log_volume is not None  # every route but `lanczos` has one, and that is for "basic"
        log_sum = -math.inf if deficient else answer.log_volume
        log_volume = log_sum + n * exponent * math.log(2.0)
        # Equal singular values give 0 up to rounding, never less.
        deficit = max(0.5 * n * math.log(sum_of_squares / n) - log_sum, 0.0)
    return SpectralFacts(
        sigma_max=math.ldexp(answer.largest, exponent),
        sigma_min=0.0 if deficient else math.ldexp(answer.smallest, exponent),
        condition_number=math.inf if deficient else _reported_condition(answer),
        frobenius_norm=math.ldexp(math.sqrt(sum_of_squares), exponent),
        stable_rank=min(max(sum_of_squares / answer.largest**2, 1.0), float(n)),
        log_volume=log_volume,
        entropy_deficit=deficit,
        relative_error=answer.error,
        method=answer.method,
        spectrum=_stored(answer.values, exponent) if spectrum and answer.values is not None else None,
    )


def _reported_condition(answer: _Answer) -> float:
    """The ratio of the ends, or, where the error is too much for a figure, the bound that holds in spite of it."""
    ratio = max(1.0, answer.largest / answer.smallest)
    return ratio if answer.error <= BOUND_FROM else max(1.0, ratio / (1.0 + answer.error))


def _stored(values: Tensor, exponent: int) -> tuple[float, ...]:
    """As fp32, in which a report keeps them."""
    exact = torch.ldexp(values.double(), torch.tensor(exponent, device=values.device))
    return tuple(exact.to(torch.float32).tolist())


def _norm_blocks(tall: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tall.dtype, torch.float32)
    rows = max(1, 2**22 // tall.shape[1])
    return [block.to(dtype) for block in tall.split(rows)]
