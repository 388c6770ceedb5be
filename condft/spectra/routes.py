r"""The two ends of a spectrum without its full SVD: several routes, and the decision which answer is good enough.

The cheapest route comes first. Each states the error of its answer; where that is too large, the next one is taken:

- `eigen` (up to an order of 256): all eigenvalues of `W^T W` in double precision.
- `gram` (rectangles): `W^T W` in single precision, and Lanczos on it. Where this does not find the lower end, Lanczos
  on the inverse by a Cholesky factor. Two more Cholesky factorizations prove that nothing lies beyond the ends.
- `cholesky` (large condition numbers, and squares up to an order of 1024): the same in double precision.
- `qr` (tall matrices): the triangular factor in fp64, then as `cholesky`. Past a condition number of 1e6 a Gram matrix
  no longer resolves the lower end: the answer is then what several start vectors find, without proof.
- `lu` (large squares, and squares with a condition number past 1e6, whose smallest singular value lies at the hard
  edge of the spectrum): LU of W in fp64, then Lanczos on the inverse, from several start vectors, without proof.
- `svd` (small matrices, and condition numbers past 1e12): all singular values in fp64.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from condft.spectra.factor import (
    cholesky_factor,
    eigenvalues_above,
    eigenvalues_below,
    gram_matrix,
    qr_factor,
    singular_values,
)
from condft.spectra.lanczos import BlockLanczos, Ends
from condft.spectra.operators import GramProducts, Inverse, Symmetric, SymmetricProducts, TriangularInverse

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
    "fp32_proof_suffices",
    "lanczos_dtype",
    "rounding_constant",
    "settled",
    "squared_condition",
]

Measures = Literal["basic", "all"]
EPS64 = torch.finfo(torch.float64).eps

# Where the route changes, all measured on CPUs; `condft.analysis.measure` predicts costs by these numbers.
SMALL = 48  # up to here an SVD costs less than the overhead of anything else
EIGEN_UP_TO = 256  # up to here all eigenvalues cost less than two ends and their proof
NEARLY_SQUARE = 0.8  # aspect n / m above which sigma_min is too close to 0 for single precision to resolve it
PROVEN_UP_TO = 1024  # order of a square whose ends get a proof; of larger ones it takes 1.6 times as long as the LU
_STARTS = 4  # start vectors that a proof is tried with before the next route takes over
# Rounding moves sigma_n^2 by this times eps * sigma_1^2. Measured: 0.7 and less up to 30,000 rows; but m / 1300 where
# entries are stored in a narrower dtype than they are summed in.
_GRAM_ROUNDING = 1.0
_GRAM_ROUNDING_NARROW = 1 / 500
# Fraction of the tolerance at which the estimated error of an end stops the process. 0.4 would do for the proof;
# 0.05 makes the figure some 20 times as good for a few more steps.
PROVEN_TOLERANCE = 0.05
PROVEN_WIDTH = 0.4  # of the tolerance: how far beyond each end the proof begins
_UNPROVEN = 0.2  # as PROVEN_TOLERANCE, where nothing is proven
# From this order on a factorization costs more than many steps. If the estimated error of the lower end is at most
# _IN_SIGHT, the process goes on for _PATIENCE times its steps so far before an inverse is made for that end.
_FACTORS_COST_FROM, _IN_SIGHT, _PATIENCE = 2048, 0.03, 1.5
_EIGEN_ROUNDING = 1.0  # of the eigenvalues, in the same unit; measured: with the Gram matrix's 0.7 together
_SEVERAL = 4  # start vectors where nothing is proven


@dataclass(frozen=True)
class Answer:
    """What a route found.

    Attributes:
        largest: Largest singular value.
        smallest: Smallest singular value.
        log_volume: Sum of the logs of all singular values; None if the route has no factor that gives it.
        error: Relative error of the condition number that the route states.
        method: Name of the route.
        values: All singular values, descending, if the route found them.
    """

    largest: float
    smallest: float
    log_volume: float | None
    error: float
    method: str
    values: Tensor | None = None


def lanczos_dtype(tall: Tensor) -> torch.dtype:
    """The dtype for products with the stored matrix: fp32 holds every narrower format exactly."""
    return torch.float64 if tall.dtype == torch.float64 else torch.float32


def check_measures(measures: str) -> None:
    """Checks that `measures` is one of `Measures`.

    Raises:
        ValueError: It is not; the message names the choices.
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
    """The whole spectrum by `singular_values`: the route of last resort."""
    values = singular_values(tall)
    largest, smallest = float(values[0]), float(values[-1])
    log_volume = float(values.log().sum()) if smallest > 0 else -math.inf
    # Each value is off by some eps * sigma_1 (Golub & Van Loan, section 8.6), which is eps * kappa of the smallest.
    error = max(tall.shape) * EPS64 * (largest / smallest if smallest > 0 else math.inf)
    return Answer(largest, smallest, log_volume, error, "svd", values)


def _by_eigenvalues(tall: Tensor, rtol: float) -> Answer | None:
    """Every eigenvalue of `W^T W`; None if the squared condition number is too large to resolve the smallest one."""
    values = torch.linalg.eigvalsh(gram_matrix(tall, torch.float64))
    return answer_of_eigenvalues(values, rtol, rounding_constant(tall, torch.float64))


def answer_of_eigenvalues(ascending: Tensor, rtol: float, constant: float) -> Answer | None:
    """The answer from all eigenvalues of `W^T W`, fp64, if they are exact enough.

    Args:
        ascending: The eigenvalues.
        rtol: Relative error allowed.
        constant: `rounding_constant` of the Gram matrix.
    """
    values = ascending.flip(0)
    largest, smallest = float(values[0]), float(values[-1])
    if smallest <= 0.0:
        return None
    # The rounding of the decomposition (Golub & Van Loan, section 8.3) adds to that of the Gram matrix.
    rounding = (constant + _EIGEN_ROUNDING) * EPS64 * largest / smallest
    if rounding > rtol / 5:
        return None
    return Answer(math.sqrt(largest), math.sqrt(smallest), 0.5 * float(values.log().sum()), rounding, "eigen")


def rounding_constant(tall: Tensor, dtype: torch.dtype) -> float:
    """Rounding error of the Gram matrix in `dtype` of a tall `(..., m, n)`, in units of `squared_condition`."""
    narrow = tall.dtype.itemsize < dtype.itemsize
    return max(_GRAM_ROUNDING, _GRAM_ROUNDING_NARROW * tall.shape[-2]) if narrow else _GRAM_ROUNDING


def _by_gram(tall: Tensor, rtol: float, dtype: torch.dtype, method: str, measures: Measures) -> Answer | None:
    """The ends of `W^T W`; None if the squared condition number is too large for `dtype`."""
    return _certified(gram_matrix(tall, dtype), rtol, method, measures, rounding_constant(tall, dtype))


def _by_qr(tall: Tensor, rtol: float, measures: Measures) -> Answer | None:
    factor = qr_factor(tall)
    answer = _unproven(GramProducts(factor, factor.dtype), TriangularInverse(factor.mT), rtol, "qr")
    if answer is None:
        return None
    if _GRAM_ROUNDING * squared_condition(answer.largest, answer.smallest, torch.float64) > rtol / 5:
        # A Gram matrix would lose the lower end to rounding, so no proof is possible: take what the vectors found.
        # The product of all singular values is |det R|.
        log_volume = float(factor.diagonal().abs().log().sum())
        return dataclasses.replace(answer, log_volume=log_volume)
    gram = gram_matrix(factor, torch.float64)
    del factor  # so that no more than two (n, n) matrices are in memory
    return _certified(gram, rtol, "qr", measures)


def _by_lu(square: Tensor, rtol: float) -> Answer | None:
    # The transpose of a row-major matrix is column-major, as LAPACK wants it: no copy is made for the layout.
    factors, pivots, info = torch.linalg.lu_factor_ex(square.to(torch.float64).mT)
    if int(info):  # a pivot is exactly 0, so there is no inverse
        return None
    # The factors are those of the transpose, so `Inverse` is (W W^T)^-1: the same eigenvalues.
    products = GramProducts(square, lanczos_dtype(square))
    answer = _unproven(products, Inverse(factors, pivots), rtol, "lu")
    # The product of all singular values is |det W|, and that is the product of the pivots.
    log_volume = float(factors.diagonal().abs().log().sum())
    return None if answer is None else dataclasses.replace(answer, log_volume=log_volume)


def _unproven(products: Symmetric, inverse: Symmetric, rtol: float, method: str) -> Answer | None:
    """Both ends from several start vectors, each end to `rtol / 2`; None past 1e12, where only the SVD is reliable.

    No Gram matrix resolves such a lower end, so nothing can be proven. Several vectors miss an end only together.
    """
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
    """Whether the upper end is found: to the tolerance, or exactly in an invariant subspace."""
    return ends.exhausted or ends.largest_error <= tolerance


def _certified(
    gram: Tensor, rtol: float, method: str, measures: Measures, constant: float = _GRAM_ROUNDING
) -> Answer | None:
    """Both ends of a Gram matrix, with the proof that no other singular value lies beyond them.

    A start vector that holds next to nothing of the end makes the process settle on the neighbor of the end. The proof
    then fails, and the next start vector is tried. None where the squared condition number is too large for the
    precision.
    """
    width = PROVEN_WIDTH * rtol
    for start in range(_STARTS):
        answer = _two_ends(gram, rtol, method, measures, constant, start)
        if answer is None:
            return None
        lower, upper = (answer.smallest * (1 - width)) ** 2, (answer.largest * (1 + width)) ** 2
        # The upper end only: fp32's rounding is relative to the largest eigenvalue, and would hide the lower end.
        single = fp32_proof_suffices(len(gram), rtol)
        if eigenvalues_above(gram, lower) and eigenvalues_below(gram.to(torch.float32) if single else gram, upper):
            # 4/5 of the tolerance for the margins of both ends (2 * PROVEN_WIDTH), 1/5 at most for the rounding.
            return dataclasses.replace(answer, error=2 * width + answer.error)
    return None


def fp32_proof_suffices(size: int, rtol: float) -> bool:
    """Whether fp32, which takes half the time, can prove the upper end: its rounding must be within the margin."""
    # The margin of the eigenvalue, which is squared: (1 + width)^2 - 1 is about 2 * width.
    return size * torch.finfo(torch.float32).eps <= 2 * PROVEN_WIDTH * rtol


def _two_ends(
    gram: Tensor, rtol: float, method: str, measures: Measures, constant: float, start: int
) -> Answer | None:
    """The ends that one start vector finds; `error` is the effect of the Gram matrix's rounding on the lower end."""
    tolerance = PROVEN_TOLERANCE * rtol

    def rounding(largest: float, smallest: float) -> float:
        return constant * squared_condition(largest, smallest, gram.dtype) if smallest > 0 else math.inf

    process = BlockLanczos(SymmetricProducts(gram), start=start)
    ends = process.run(lambda ends: ends.largest_error <= tolerance)
    # Ritz values lie within the spectrum: if they are too far apart for this precision already, the ends are too.
    if not settled(ends, tolerance) or rounding(ends.largest, ends.smallest) > rtol / 5:
        return None
    largest = ends.largest
    # With "all", the log-volume needs the factor in any case.
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
    """`eps kappa^2`: rounding a Gram matrix changes the smallest singular value by about this, relatively."""
    return torch.finfo(dtype).eps * (largest / smallest) ** 2
