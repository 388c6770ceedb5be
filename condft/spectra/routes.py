r"""The ends of a spectrum without its full SVD: which route, and whether its answer may stand.

Routes, cheapest first; each states the error that it vouches for, and the next one takes over where that is too much:

- `eigen`: up to an order of 256: all eigenvalues of `W^T W` in double precision.
- `gram`: for rectangles: `W^T W` in single precision, Lanczos on it and, where its lower end does not show that way,
  on its inverse by a Cholesky factor; and the proof by two Cholesky factorizations that nothing lies beyond the ends.
- `cholesky`: the same in double precision, where the condition number asks for it, and for squares up to some order.
- `qr`: the triangular factor of a tall matrix in fp64, then as before; past a condition number of 1e6, where a Gram
  matrix no longer tells, what several start vectors find.
- `lu`: for squares, whose smallest singular value hides at the hard edge of the spectrum, where they are large or
  their condition number is past 1e6: LU of W in fp64, then the process on its inverse, from several start vectors.
- `svd`: all singular values in fp64: small matrices, and condition numbers past 1e12.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from condft.spectra.factor import cholesky_factor, eigenvalues_above, eigenvalues_below, gram_matrix, qr_factor
from condft.spectra.lanczos import BlockLanczos, Ends
from condft.spectra.operators import GramProducts, Inverse, Symmetric, SymmetricProducts, TriangularInverse
from condft.spectra.reference import singular_values

__all__ = [
    "EIGEN_UP_TO",
    "EPS64",
    "NEARLY_SQUARE",
    "PROVEN_TOLERANCE",
    "PROVEN_UP_TO",
    "PROVEN_WIDTH",
    "SMALL",
    "Answer",
    "Measures",
    "answer_of_eigenvalues",
    "by_svd",
    "check_measures",
    "find_ends",
    "lanczos_dtype",
    "rounding_constant",
    "settled",
    "single_precision_tells",
    "squared_condition",
]

Measures = Literal["basic", "all"]
EPS64 = torch.finfo(torch.float64).eps

# Where the route changes; `condft.analysis.measure` predicts costs by them.
SMALL = 48  # up to here an SVD costs less than the overhead of anything else
EIGEN_UP_TO = 256  # up to here all eigenvalues cost less than two ends and their proof
NEARLY_SQUARE = 0.8  # aspect n / m above which the lower edge closes in, so that single precision cannot tell it
PROVEN_UP_TO = 1024  # order of a square whose ends get a proof; of larger ones it takes 1.6 times as long as the LU
_STARTS = 4
# Rounding moves sigma_n^2 by this times eps * sigma_1^2. Measured: 0.7 and less up to 30,000 rows; but m / 1300 where
# entries are stored in a narrower dtype than they are summed in.
_GRAM_ROUNDING = 1.0
_GRAM_ROUNDING_NARROW = 1 / 500
# Of the tolerance: where the estimated error of an end stops the process. A proof would let it be 0.4; the figure is
# then some 20 times as good, for a few steps more.
PROVEN_TOLERANCE = 0.05
PROVEN_WIDTH = 0.4  # of the tolerance: how far beyond each end the proof begins
_UNPROVEN = 0.2
# From this order on a factorization costs more than many steps: the lower end, if its error is estimated at no more
# than this, is looked for without an inverse, for this many times the steps that the upper one took.
_FACTORS_COST_FROM, _IN_SIGHT, _PATIENCE = 2048, 0.03, 1.5
_EIGEN_ROUNDING = 1.0  # of the eigenvalues, in the same unit; measured: with the Gram matrix's 0.7 together
_SEVERAL = 4  # start vectors where nothing is proven


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


def check_measures(measures: str) -> None:
    """Refuses what is none of `Measures`.

    Raises:
        ValueError: It names the choices.
    """
    if measures not in get_args(Measures):
        raise ValueError(f"measures={measures!r} is unknown: choose one of {', '.join(map(repr, get_args(Measures)))}")


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
    double = partial(_by_gram, dtype=torch.float64, method="cholesky", measures=measures)
    last = _by_lu if m == n else partial(_by_qr, measures=measures)
    if n <= EIGEN_UP_TO:
        return [_by_eigenvalues, last]
    if m == n:
        return [double, last] if n <= PROVEN_UP_TO else [last]
    routes: list[Callable[[Tensor, float], Answer | None]] = []
    # The edges of what is nearly square want double precision.
    if dtype != torch.float64 and n <= NEARLY_SQUARE * m:
        routes.append(partial(_by_gram, dtype=torch.float32, method="gram", measures=measures))
    if m >= 2 * n:  # less tall: a QR costs hardly more, and holds at any condition number
        routes.append(double)
    return [*routes, last]


def by_svd(tall: Tensor) -> Answer:
    values = singular_values(tall)
    largest, smallest = float(values[0]), float(values[-1])
    log_volume = float(values.log().sum()) if smallest > 0 else -math.inf
    # Each value is off by some eps * sigma_1 (Golub & Van Loan, section 8.6), which is eps * kappa of the smallest.
    error = max(tall.shape) * EPS64 * (largest / smallest if smallest > 0 else math.inf)
    return Answer(largest, smallest, log_volume, error, "svd", values)


def _by_eigenvalues(tall: Tensor, rtol: float) -> Answer | None:
    """Every eigenvalue of `W^T W`, if the condition number squared leaves the smallest its digits."""
    values = torch.linalg.eigvalsh(gram_matrix(tall, torch.float64))
    return answer_of_eigenvalues(values, rtol, rounding_constant(tall, torch.float64))


def answer_of_eigenvalues(ascending: Tensor, rtol: float, constant: float) -> Answer | None:
    """The answer of all eigenvalues of `W^T W`, fp64, if they are good enough; `constant` is the Gram matrix's."""
    values = ascending.flip(0)
    largest, smallest = float(values[0]), float(values[-1])
    if smallest <= 0.0:
        return None
    # The decomposition's own rounding (Golub & Van Loan, section 8.3) beside the Gram matrix's.
    rounding = (constant + _EIGEN_ROUNDING) * EPS64 * largest / smallest
    if rounding > rtol / 5:
        return None
    return Answer(math.sqrt(largest), math.sqrt(smallest), 0.5 * float(values.log().sum()), rounding, "eigen")


def rounding_constant(tall: Tensor, dtype: torch.dtype) -> float:
    """Of the Gram matrix in `dtype` of a tall matrix `(..., m, n)`, in units of `squared_condition`."""
    narrow = tall.dtype.itemsize < dtype.itemsize
    return max(_GRAM_ROUNDING, _GRAM_ROUNDING_NARROW * tall.shape[-2]) if narrow else _GRAM_ROUNDING


def _by_gram(tall: Tensor, rtol: float, dtype: torch.dtype, method: str, measures: Measures) -> Answer | None:
    """The ends of `W^T W`, if the condition number squared leaves them their digits."""
    return _certified(gram_matrix(tall, dtype), rtol, method, measures, rounding_constant(tall, dtype))


def _by_qr(tall: Tensor, rtol: float, measures: Measures) -> Answer | None:
    factor = qr_factor(tall)
    answer = _unproven(GramProducts(factor, factor.dtype), TriangularInverse(factor.mT), rtol, "qr")
    if answer is None:
        return None
    if _GRAM_ROUNDING * squared_condition(answer.largest, answer.smallest, torch.float64) > rtol / 5:
        # The Gram matrix could not tell: what several start vectors find has to do.
        log_volume = float(factor.diagonal().abs().log().sum())
        return dataclasses.replace(answer, log_volume=log_volume)
    gram = gram_matrix(factor, torch.float64)
    del factor  # two (n, n) matrices at a time
    return _certified(gram, rtol, "qr", measures)


def _by_lu(square: Tensor, rtol: float) -> Answer | None:
    # Of the transpose, which lies by columns, as LAPACK wants it.
    factors, pivots, info = torch.linalg.lu_factor_ex(square.to(torch.float64).mT)
    if int(info):
        return None
    products = GramProducts(square, lanczos_dtype(square))
    answer = _unproven(products, Inverse(factors, pivots), rtol, "lu")
    log_volume = float(factors.diagonal().abs().log().sum())
    return None if answer is None else dataclasses.replace(answer, log_volume=log_volume)


def _unproven(products: Symmetric, inverse: Symmetric, rtol: float, method: str) -> Answer | None:
    """Both ends by several start vectors, each end to `rtol / 2`; None past 1e12: the SVD is to decide."""
    upper, lower = (
        BlockLanczos(operator, block=_SEVERAL).run(lambda ends: ends.largest_error <= _UNPROVEN * rtol)
        for operator in (products, inverse)
    )
    if not (settled(upper, _UNPROVEN * rtol) and settled(lower, _UNPROVEN * rtol)):
        return None
    if not 0.0 < lower.largest < math.inf or upper.largest * lower.largest > 1e12:
        return None
    rounding = products.size * EPS64 * upper.largest * lower.largest
    return Answer(upper.largest, 1.0 / lower.largest, None, rtol + rounding, method)


def settled(ends: Ends, tolerance: float) -> bool:
    return ends.exhausted or ends.largest_error <= tolerance


def _certified(
    gram: Tensor, rtol: float, method: str, measures: Measures, constant: float = _GRAM_ROUNDING
) -> Answer | None:
    """Both ends of a Gram matrix, with the proof that no other singular value lies beyond them.

    A start vector that hardly holds an end leads to a settled answer that is its neighbor; then the next one has a
    try. None where the squared condition number is too much for the precision.
    """
    width = PROVEN_WIDTH * rtol
    for start in range(_STARTS):
        answer = _two_ends(gram, rtol, method, measures, constant, start)
        if answer is None:
            return None
        lower, upper = (answer.smallest * (1 - width)) ** 2, (answer.largest * (1 + width)) ** 2
        single = single_precision_tells(len(gram), rtol)
        if eigenvalues_above(gram, lower) and eigenvalues_below(gram.to(torch.float32) if single else gram, upper):
            return dataclasses.replace(answer, error=2 * width + answer.error)
    return None


def single_precision_tells(size: int, rtol: float) -> bool:
    """Whether the upper end may be proven in fp32, in half the time: it rounds off less than the width left to it."""
    return size * torch.finfo(torch.float32).eps <= 2 * PROVEN_WIDTH * rtol


def _two_ends(
    gram: Tensor, rtol: float, method: str, measures: Measures, constant: float, start: int
) -> Answer | None:
    """What one start vector finds; its `error` is what rounding the Gram matrix does to the smaller end."""
    tolerance = PROVEN_TOLERANCE * rtol

    def rounding(largest: float, smallest: float) -> float:
        return constant * squared_condition(largest, smallest, gram.dtype) if smallest > 0 else math.inf

    process = BlockLanczos(SymmetricProducts(gram), start=start)
    ends = process.run(lambda ends: ends.largest_error <= tolerance)
    # Ritz values lie within the spectrum: where already they are too far apart, so are the ends.
    if not settled(ends, tolerance) or rounding(ends.largest, ends.smallest) > rtol / 5:
        return None
    largest = ends.largest
    if measures == "basic" and len(gram) >= _FACTORS_COST_FROM and ends.smallest_error <= _IN_SIGHT:
        more = int(_PATIENCE * ends.steps)
        ends = process.run(lambda ends: ends.smallest_error <= tolerance, max_steps=more)
    if measures == "basic" and (ends.exhausted or ends.smallest_error <= tolerance):
        error = rounding(largest, ends.smallest)
        return Answer(largest, ends.smallest, None, error, method) if error <= rtol / 5 else None
    factor = cholesky_factor(gram)
    if factor is None:
        return None
    inverse = BlockLanczos(TriangularInverse(factor), start=start).run(lambda ends: ends.largest_error <= tolerance)
    if not settled(inverse, tolerance) or not 0.0 < inverse.largest < math.inf:
        return None
    error = rounding(largest, 1.0 / inverse.largest)
    log_volume = float(factor.diagonal().double().log().sum())
    return Answer(largest, 1.0 / inverse.largest, log_volume, error, method) if error <= rtol / 5 else None


def squared_condition(largest: float, smallest: float, dtype: torch.dtype) -> float:
    """`eps kappa^2`: the unit of what rounding a Gram matrix does to the relative error of the smallest value."""
    return torch.finfo(dtype).eps * (largest / smallest) ** 2
