r"""The ends of a spectrum without its full SVD: which route, and whether its answer may stand.

Routes, cheapest first; each states the error that it vouches for, and the next one takes over where that is too much:

- `gram`: for rectangles: the Cholesky factor of `W^T W` in single precision, Golub-Kahan-Lanczos on it and on its
  inverse, and the proof by two more Cholesky factorisations that nothing lies beyond the two ends.
- `cholesky`: the same in double precision, where the condition number or the log-volume asks for it.
- `qr`: the triangular factor of a tall matrix in fp64, then as before; past a condition number of 1e6, where a Gram
  matrix no longer tells, what two start vectors agree on.
- `lu`: for squares, whose smallest singular value hides at the hard edge of the spectrum, where they are large or
  their condition number is past 1e6: LU of W in fp64, then the process on its inverse, from two start vectors.
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
    "EPS64",
    "NEARLY_SQUARE",
    "PROVEN_UP_TO",
    "SINGLE_FROM",
    "SMALL",
    "Answer",
    "Measures",
    "by_svd",
    "find_ends",
    "lanczos_dtype",
]

Measures = Literal["basic", "all"]
EPS64 = torch.finfo(torch.float64).eps

# Where the route changes; `condft.measuring` predicts costs by them.
SMALL = 48  # up to here an SVD costs less than the overhead of anything else
SINGLE_FROM = 256  # up to here a Gram matrix costs little in either precision
NEARLY_SQUARE = 0.8  # aspect n / m above which the lower edge closes in, so that single precision cannot tell it
_STARTS = 4
PROVEN_UP_TO = 1024  # order of a square whose ends get a proof; of larger ones it takes 1.6 times as long as the LU
# Rounding moves sigma_n^2 by this times eps * sigma_1^2. Measured: 0.7 and less up to 30,000 rows; but m / 1300 where
# entries are stored in a narrower dtype than they are summed in.
_GRAM_ROUNDING = 1.0
_GRAM_ROUNDING_NARROW = 1 / 500
_MAX_STEPS = 160


@dataclass(frozen=True)
class Answer:
    """A route's result: the two ends, log |det| of the triangular factor if it has one, and a relative error of κ."""

    largest: float
    smallest: float
    log_volume: float | None
    error: float
    method: str
    values: Tensor | None = None


def lanczos_dtype(tall: Tensor) -> torch.dtype:
    return torch.float64 if tall.dtype == torch.float64 else torch.float32


def find_ends(tall: Tensor, measures: Measures, rtol: float) -> Answer:
    """The first route whose error is within the tolerance."""
    m, n = tall.shape
    if n > SMALL:
        for route in _routes(m, n, measures, tall.dtype):
            answer = route(tall, rtol)
            if answer is not None:
                return answer
    return by_svd(tall)


def _routes(m: int, n: int, measures: Measures, dtype: torch.dtype) -> list[Callable[[Tensor, float], Answer | None]]:
    double = partial(_by_gram, dtype=torch.float64, method="cholesky")
    if m == n:
        return [double, _by_lu] if n <= PROVEN_UP_TO else [_by_lu]
    routes: list[Callable[[Tensor, float], Answer | None]] = []
    # The log-volume sums n logarithms, so that it wants double precision; so do the edges of what is nearly square.
    if measures == "basic" and dtype != torch.float64 and SINGLE_FROM < n <= NEARLY_SQUARE * m:
        routes.append(partial(_by_gram, dtype=torch.float32, method="gram"))
    if m >= 2 * n:  # less tall: a QR costs hardly more, and holds at any condition number
        routes.append(double)
    return [*routes, _by_qr]


def by_svd(tall: Tensor) -> Answer:
    values = singular_values(tall)
    largest, smallest = float(values[0]), float(values[-1])
    log_volume = float(values.log().sum()) if smallest > 0 else -math.inf
    # Each value is off by some eps * sigma_1 (Golub & Van Loan, section 8.6), which is eps * kappa of the smallest.
    error = max(tall.shape) * EPS64 * (largest / smallest if smallest > 0 else math.inf)
    return Answer(largest, smallest, log_volume, error, "svd", values)


def _by_gram(tall: Tensor, rtol: float, dtype: torch.dtype, method: str) -> Answer | None:
    """The ends of the Cholesky factor of `W^T W`, if the condition number squared leaves them their digits."""
    narrow = tall.dtype.itemsize < dtype.itemsize
    constant = max(_GRAM_ROUNDING, _GRAM_ROUNDING_NARROW * tall.shape[0]) if narrow else _GRAM_ROUNDING
    return _certified(gram_matrix(tall, dtype), rtol, method, constant)


def _by_qr(tall: Tensor, rtol: float) -> Answer | None:
    factor = qr_factor(tall).mT
    answer = _by_triangle(factor, rtol, "qr")
    if answer is None or _GRAM_ROUNDING * _squared(answer, torch.float64) > rtol / 5:
        return answer  # the Gram matrix could not tell: what two start vectors agree on has to do
    gram = gram_matrix(factor.mT, torch.float64)
    del factor  # two (n, n) matrices at a time
    return _certified(gram, rtol, "qr")


def _by_lu(square: Tensor, rtol: float) -> Answer | None:
    largest = _agreed(MatrixProducts(square, lanczos_dtype(square)), rtol / 2)
    if not largest.settled:
        return None
    factors, pivots, info = torch.linalg.lu_factor_ex(square.to(torch.float64))
    if int(info):
        return None
    inverse = _agreed(Inverse(factors, pivots), rtol / 2)
    log_volume = float(factors.diagonal().abs().log().sum())
    return _from_inverse(largest, inverse, log_volume, square.shape[0], "lu", rtol)


def _certified(gram: Tensor, rtol: float, method: str, constant: float = _GRAM_ROUNDING) -> Answer | None:
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
        # Single precision tells the upper end in half the time, if the width is more than it may round off.
        single = gram.shape[0] * torch.finfo(torch.float32).eps <= 2 * width
        if eigenvalues_above(gram, lower) and eigenvalues_below(gram.to(torch.float32) if single else gram, upper):
            return dataclasses.replace(answer, error=2 * width + rounding)
    return None


def _squared(answer: Answer, dtype: torch.dtype) -> float:
    """`eps kappa^2`: the unit of what rounding a Gram matrix does to the relative error of the smallest value."""
    return torch.finfo(dtype).eps * (answer.largest / answer.smallest) ** 2


def _by_triangle(factor: Tensor, rtol: float, method: str, starts: tuple[int, ...] = (0, 1)) -> Answer | None:
    diagonal = factor.diagonal().abs()
    if not bool((diagonal > 0).all()):
        return None
    largest = _agreed(MatrixProducts(factor.mT, factor.dtype), rtol / 2, starts)  # LAPACK stores it by columns
    if not largest.settled:
        return None
    inverse = _agreed(TriangularInverse(factor), rtol / 2, starts)
    return _from_inverse(largest, inverse, float(diagonal.double().log().sum()), factor.shape[0], method, rtol)


def _agreed(products: Products, rtol: float, starts: tuple[int, ...] = (0, 1)) -> Ends:
    """The larger answer of some start vectors; where two differ, up to `_STARTS` of them, until two agree on it.

    Of a single one nothing can agree: its answer is left to the caller to prove.
    """

    def found_from(start: int) -> Ends:
        return golub_kahan(
            products, wanted="largest", rtol=rtol, max_steps=_MAX_STEPS, start=start, proven_later=len(starts) == 1
        )

    found = [found_from(start) for start in starts]
    while len(starts) > 1:
        first, second = sorted(found, key=lambda ends: ends.largest)[-2:]
        if second.largest - first.largest <= rtol * second.largest:
            break
        if len(found) == _STARTS:
            return dataclasses.replace(second, settled=False)
        found.append(found_from(starts[0] + len(found)))
    return max(found, key=lambda ends: ends.largest)


def _from_inverse(
    largest: Ends, inverse: Ends, log_volume: float, size: int, method: str, rtol: float
) -> Answer | None:
    """Joins sigma_1 and 1 / sigma_1 of the inverse, both to `rtol / 2`; None past 1e12: the SVD is to decide."""
    if not inverse.settled or not 0.0 < inverse.largest < math.inf:
        return None
    smallest = 1.0 / inverse.largest
    if largest.largest / smallest > 1e12:
        return None
    rounding = size * EPS64 * largest.largest / smallest
    return Answer(largest.largest, smallest, log_volume, rtol + rounding, method)
