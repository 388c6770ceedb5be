r"""Spectral facts of many matrices of one shape in batched calls, for devices that one small matrix cannot keep busy.

The routes are those of `condft.spectra.routes`, up to an order of 1024. A matrix without an answer from them is
computed alone. **The facts of a matrix do not depend on the rest of its batch**: a library may choose its
kernel by the size of the batch, so all batches of a shape have the same size (short ones are filled up), and no
operation mixes the members.

On the CPU, a matrix alone and in a batch then has equal facts, bit for bit, if its order is a multiple of 16
(tested). For other orders MKL chooses kernels by the address of a member, and single precision differs in the seventh
digit. On CUDA all members of a batch go through one kernel, which cuBLAS and cuSOLVER choose by sizes, strides and
alignment; these are the same for every batch of a shape.

On the CPU threads are the better way (`condft.analysis.threads`): batches of experts take three times as long, and
heads take so little that it does not matter (`python -m scripts.bench.analyzer --only batches`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from condft.spectra.batched.lanczos import run_batch
from condft.spectra.facts import NonFiniteError, SpectralFacts, facts_of, scale_exponent, spectral_facts, tall_of
from condft.spectra.lanczos import MAX_VECTORS, Ends
from condft.spectra.operators import TriangularInverse
from condft.spectra.precision import fp32_products
from condft.spectra.routes import (
    EIGEN_UP_TO,
    NEARLY_SQUARE,
    PROVEN_TOLERANCE,
    PROVEN_UP_TO,
    PROVEN_WIDTH,
    SMALL,
    Answer,
    Measures,
    answer_of_eigenvalues,
    check_measures,
    fp32_proof_suffices,
    rounding_constant,
    settled,
    squared_condition,
)

__all__ = ["batch_size", "batched_facts"]

T = TypeVar("T")
Route = Callable[[Tensor, float], list[Answer | None]]

_BATCH_BYTES = 512 * 2**20
_MOST = 64
_LARGEST_ORDER, _LARGEST_ENTRIES = 1024, 2**22  # larger matrices keep a device busy one by one


def batch_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many matrices of a shape and dtype make a batch: as many as work in half a GiB; 1 for no batch.

    It depends on nothing else, so that the facts of a matrix do not either.

    >>> batch_size((512, 128), torch.bfloat16)
    64
    >>> batch_size((4096, 4096), torch.bfloat16)  # one such matrix keeps a device busy
    1
    """
    n, m = sorted(shape)
    # float8 has no arithmetic and would have to be widened first, so it goes alone.
    if not _routes(m, n, "basic", dtype) or dtype.itemsize == 1 or n > _LARGEST_ORDER or m * n > _LARGEST_ENTRIES:
        return 1
    # In bytes: the stack, the members that a route works on, and those in double precision; then the Gram matrix, its
    # factor and their copies; then the basis and the projection of the Lanczos process.
    members = m * n * (2 * dtype.itemsize + 8)
    return max(1, min(_MOST, _BATCH_BYTES // (members + 40 * n * n + 8 * MAX_VECTORS * (n + MAX_VECTORS))))


@fp32_products()
def batched_facts(
    matrices: Sequence[Tensor], *, measures: Measures = "basic", rtol: float = 1e-3
) -> list[SpectralFacts | None]:
    """The facts of each matrix, up to rounding those of `spectral_facts`.

    Args:
        matrices: `(m, k)` each, of one shape, dtype and device; `batch_size` of them at most. Not modified.
        measures: As of `spectral_facts`.
        rtol: As of `spectral_facts`.

    Returns:
        Facts in the order of the matrices; None for one that holds NaN or infinity.

    Raises:
        ValueError: No matrix, too many, one of another shape, or unknown measures.

    >>> heads = torch.randn(3, 512, 128, generator=torch.Generator().manual_seed(0))
    >>> [round(facts.condition_number, 1) for facts in batched_facts(list(heads))]
    [3.0, 2.9, 2.9]
    """
    check_measures(measures)
    size = batch_size(matrices[0].shape, matrices[0].dtype) if matrices else 0
    if not 0 < len(matrices) <= size:
        raise ValueError(f"{len(matrices)} matrices in a batch of {size}")
    stacked = tall_of(torch.stack(_filled_up(list(matrices), size)))
    # The others go alone: a batch does not scale its members, and it would divide by 0 for a zero matrix.
    ordinary = [math.isfinite(entry) and entry > 0.0 and not scale_exponent(entry) for entry in _largest(stacked)]
    sums = _sums_of_squares(stacked)
    _, m, n = stacked.shape
    answers: dict[int, Answer] = {}
    waiting = [index for index in range(len(matrices)) if ordinary[index]]
    for route in _routes(m, n, measures, stacked.dtype):
        if waiting:
            # Filled up again: the second route must see batches of this size too. The extra answers are at the end.
            found = route(stacked[_filled_up(waiting, size)], rtol)
            answers |= {index: answer for index, answer in zip(waiting, found, strict=False) if answer is not None}
            waiting = [index for index in waiting if index not in answers]
    return [
        facts_of(answers[index], (m, n), sums[index], measures) if index in answers else _alone(matrix, measures, rtol)
        for index, matrix in enumerate(matrices)
    ]


def _filled_up(items: list[T], size: int) -> list[T]:
    return items + items[-1:] * (size - len(items))


def _alone(matrix: Tensor, measures: Measures, rtol: float) -> SpectralFacts | None:
    try:
        return spectral_facts(matrix, measures=measures, rtol=rtol)
    except NonFiniteError:
        return None


def _largest(stacked: Tensor) -> list[float]:
    lowest, highest = torch.aminmax(stacked.flatten(1), dim=1)
    largest: list[float] = torch.maximum(lowest.abs(), highest.abs()).tolist()
    return largest


def _sums_of_squares(stacked: Tensor) -> list[float]:
    along = 1 if stacked.stride(1) < stacked.stride(2) else 2
    norms = torch.linalg.vector_norm(stacked, dim=along, dtype=torch.promote_types(stacked.dtype, torch.float32))
    sums: list[float] = norms.double().square().sum(1).tolist()
    return sums


def _routes(m: int, n: int, measures: Measures, dtype: torch.dtype) -> list[Route]:
    """The routes of `condft.spectra.routes.find_ends` that work in batches."""
    double = partial(_by_gram, dtype=torch.float64, method="cholesky", measures=measures)
    if n <= SMALL:
        return []
    if n <= EIGEN_UP_TO:
        return [_by_eigenvalues]
    if m == n:
        return [double] if n <= PROVEN_UP_TO else []
    routes: list[Route] = []
    if dtype != torch.float64 and n <= NEARLY_SQUARE * m:
        routes.append(partial(_by_gram, dtype=torch.float32, method="gram", measures=measures))
    if m >= 2 * n:
        routes.append(double)
    return routes


def _gram(tall: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, m, n)` -> `(B, n, n)` in `dtype`, exactly symmetric."""
    members = tall.to(dtype)
    gram = torch.bmm(members.mT, members).tril_()
    # A product may round the two triangles differently; Lanczos reads both, the Cholesky factor reads one.
    return gram + gram.tril(-1).mT


def _by_eigenvalues(tall: Tensor, rtol: float) -> list[Answer | None]:
    values = torch.linalg.eigvalsh(_gram(tall, torch.float64)).cpu()
    constant = rounding_constant(tall, torch.float64)
    return [answer_of_eigenvalues(each, rtol, constant) for each in values]


def _by_gram(tall: Tensor, rtol: float, dtype: torch.dtype, method: str, measures: Measures) -> list[Answer | None]:
    """Both ends of each Gram matrix with the proof that nothing lies beyond them, from one start vector."""
    gram = _gram(tall, dtype)
    answers = _two_ends(gram, rtol, method, measures, rounding_constant(tall, dtype))
    width = PROVEN_WIDTH * rtol
    # A matrix without an answer needs no proof: any bound will do.
    lower = [0.0 if answer is None else (answer.smallest * (1 - width)) ** 2 for answer in answers]
    upper = [1.0 if answer is None else (answer.largest * (1 + width)) ** 2 for answer in answers]
    above = _definite(gram, lower)
    if dtype != torch.float32 and fp32_proof_suffices(gram.shape[1], rtol):
        gram = gram.to(torch.float32)
    below = _definite(gram.neg_(), [-bound for bound in upper])  # not needed again, so it stays negated
    return [
        dataclasses.replace(answer, error=2 * width + answer.error) if answer is not None and a and b else None
        for answer, a, b in zip(answers, above, below, strict=True)
    ]


def _definite(gram: Tensor, shifts: list[float]) -> list[bool]:
    """Whether each matrix minus its shift times the identity is positive definite. `gram` is restored afterwards."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal -= torch.tensor(shifts, dtype=gram.dtype, device=gram.device)[:, None]
    info = torch.linalg.cholesky_ex(gram).info
    diagonal.copy_(before)
    return [flag == 0 for flag in info.tolist()]


def _two_ends(gram: Tensor, rtol: float, method: str, measures: Measures, constant: float) -> list[Answer | None]:
    """The ends of each from one start vector; `error` is the effect of the Gram matrix's rounding on the lower one."""
    tolerance = PROVEN_TOLERANCE * rtol

    def until(ends: Ends) -> bool:
        return ends.largest_error <= tolerance

    def answer(largest: float, smallest: float, log_volume: float | None) -> Answer | None:
        error = constant * squared_condition(largest, smallest, gram.dtype) if smallest > 0 else math.inf
        return Answer(largest, smallest, log_volume, error, method) if error <= rtol / 5 else None

    count = len(gram)
    upper = [ends for ends in run_batch(lambda v: torch.bmm(v, gram), gram, until, [True] * count) if ends is not None]
    # Ritz values lie within the spectrum: if they are too far apart for this precision already, the ends are too.
    answers = [answer(e.largest, e.smallest, None) if settled(e, tolerance) else None for e in upper]
    seen = [measures == "basic" and (e.exhausted or e.smallest_error <= tolerance) for e in upper]
    # Where a matrix is not definite its factor is garbage: such a member is not in `unsettled`, so nobody reads it.
    factor, info = torch.linalg.cholesky_ex(gram)
    definite = [flag == 0 for flag in info.tolist()]
    unsettled = [a is not None and not s and d for a, s, d in zip(answers, seen, definite, strict=True)]
    volumes: list[float] = factor.diagonal(dim1=1, dim2=2).double().log().sum(1).tolist()
    inverse = run_batch(TriangularInverse(factor), gram, until, unsettled) if any(unsettled) else [None] * count
    for index, ends in enumerate(inverse):
        if seen[index]:
            continue
        answers[index] = None
        if ends is not None and settled(ends, tolerance) and 0.0 < ends.largest < math.inf:
            answers[index] = answer(upper[index].largest, 1.0 / ends.largest, volumes[index])
    return answers
