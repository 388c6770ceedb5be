r"""Block Lanczos on $A^T A$, or on its inverse: the ends of a spectrum from products with a few vectors at a time.

From b start vectors, $A^T A\,Q_k = Q_k T_k + q_{k+1} R_k e_k^T$ (Golub & Underwood 1977; Golub & Van Loan, §10.3.6).
The square roots of the eigenvalues of $T_k$, the Ritz values, lie within the spectrum of A: the largest is never above
$\sigma_1$, the smallest never under $\sigma_n$.

If the start vectors hold next to nothing of an end, the process settles on the neighbor of that end, and nothing shows
it: in 1000 Gaussian matrices one start vector misses an end some 20 times. So the callers either take one vector, the
fastest, and prove afterwards that nothing lies beyond what it found (`condft.spectra.factor`); or they take several
vectors, which miss an end only if all of them do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from condft.spectra.operators import Symmetric

__all__ = ["MAX_VECTORS", "BlockLanczos", "Ends", "next_look", "ritz_ends", "start_vectors"]

MAX_VECTORS = 160

# A check of the ends costs an eigendecomposition of T, as much as some steps on a small matrix. So the first check
# comes after 4 vectors, the next one after 1/5 more; on a large matrix, whose steps are limited by memory, 1/10 more.
_FIRST_CHECK = 4
_CHECKS, _CHECKS_OF_LARGE, _LARGE = 5, 10, 2048
_NOTHING_NEW = 1e-3  # a new vector of this relative size is mostly rounding noise of the known ones
_SEED = 0x5EED
_NEXT_START = 0x9E3779B1  # odd, so that all starts differ in the 32 bits of a seed that torch's generator uses


@dataclass(frozen=True)
class Ends:
    """The ends of the spectrum as far as the process knows them.

    Attributes:
        largest: Largest Ritz value, at most sigma_1 of what the operator is the square of.
        smallest: Smallest Ritz value, at least sigma_n.
        largest_error: Estimated relative error of `largest`; the true one is 3 to 100 times smaller.
        smallest_error: The same of `smallest`.
        steps: Products with the operator.
        exhausted: The process found an invariant subspace, so that the ends are exact.
    """

    largest: float
    smallest: float
    largest_error: float
    smallest_error: float
    steps: int
    exhausted: bool = False


class BlockLanczos:
    """A process that can be continued: `run` takes further steps from where the last call ended.

    Every new vector is orthogonalized against all earlier ones, twice: without it, rounding brings found vectors back
    and T shows copies of the ends. T is the projection as it was computed, not the block tridiagonal matrix that it
    would be in exact arithmetic.

    Args:
        operator: Symmetric and positive semidefinite.
        block: How many vectors go through the operator at a time.
        start: Number of the start vectors, which depend on it and on the size only.
        max_vectors: Size of the basis at which the process gives up.
    """

    def __init__(self, operator: Symmetric, *, block: int = 1, start: int = 0, max_vectors: int = MAX_VECTORS) -> None:
        self.operator = operator
        self.block = min(block, operator.size)
        limit = min(max_vectors, operator.size) // self.block * self.block
        self.basis = operator.empty(limit + self.block)  # one block more: the last step writes the next vectors too
        # fp64 also if the process is in fp32: the eigenvalues of T must not lose more than the process did.
        self.projection = torch.zeros(limit, limit, dtype=torch.float64, device=self.basis.device)
        self.basis[: self.block] = start_vectors(operator.size, self.block, start).to(self.basis)
        self.vectors = 0  # number of basis vectors that the operator was applied to
        self.ends: Ends | None = None  # of the last check

    def run(self, until: Callable[[Ends], bool], max_steps: int | None = None) -> Ends:
        """Takes steps until the ends satisfy the caller, or the basis is full.

        Args:
            until: Called at each check of the ends, which is not after each step.
            max_steps: Maximum number of further steps.

        Returns:
            The ends after the last step.
        """
        limit = len(self.projection)
        if max_steps is not None:
            limit = min(limit, self.vectors + max_steps * self.block)
        next_check = min(next_look(self.vectors, self.operator.size), limit)
        while self.vectors < limit and not (self.ends is not None and self.ends.exhausted):
            coupling = self._step()
            if self.vectors >= next_check or self.vectors == limit:
                seen = self.projection[: self.vectors, : self.vectors].cpu()
                self.ends = ritz_ends(seen, coupling.double().cpu(), self.operator.size, self.basis.dtype)
                if until(self.ends):
                    break
                next_check = min(next_look(self.vectors, self.operator.size), limit)
        assert self.ends is not None  # there is room for a first step
        return self.ends

    def _step(self) -> Tensor:
        """One product with the operator.

        Returns:
            R, `(b, b)`: the new vectors times R are the part of the product that the basis did not hold yet.
        """
        before, now = self.vectors, self.vectors + self.block
        known = self.basis[:now]
        new = self.operator(known[before:])
        inner = new @ known.mT
        new = torch.addmm(new, inner, known, alpha=-1)
        again = new @ known.mT
        new = torch.addmm(new, again, known, alpha=-1)
        # With what the second pass removed: T is the projection as it was computed.
        self.projection[:now, before:now] = (inner + again).mT
        following = self.basis[now : now + self.block]
        self.vectors = now
        if self.block == 1:  # the QR of one vector is a division by its norm, without a call of LAPACK
            norm = torch.linalg.vector_norm(new)
            torch.div(new, norm, out=following)
            return norm.reshape(1, 1)
        vectors, coupling = torch.linalg.qr(new.mT)
        following.copy_(vectors.mT)
        sizes = coupling.diagonal().abs()
        if bool(sizes.min() < _NOTHING_NEW * sizes.max()):
            # The QR scales such a vector up to length 1, and with it the noise, which lies in the known space.
            following.sub_((following @ known.mT) @ known)
        return coupling


def next_look(vectors: int, size: int) -> int:
    """The number of vectors after which the ends are checked again, for an operator of this size."""
    checks = _CHECKS if size < _LARGE else _CHECKS_OF_LARGE
    return max(_FIRST_CHECK, vectors + max(1, vectors // checks))


def ritz_ends(projection: Tensor, coupling: Tensor, size: int, dtype: torch.dtype) -> Ends:
    """The extreme Ritz values, with errors from their residuals and the gaps to their neighbors.

    Args:
        projection: `(k, k)`, fp64 on the CPU: T, of which the upper triangle is read.
        coupling: `(b, b)`, fp64 on the CPU: R of the last step.
        size: Size of the operator.
        dtype: Dtype of the process.
    """
    vectors, block = len(projection), len(coupling)
    if not bool(torch.isfinite(projection).all()):  # a singular factor has no inverse: no ends this way
        return Ends(math.inf, 0.0, math.inf, math.inf, vectors // block)
    # `_step` writes T by columns, down to the diagonal block: the part below stays zero.
    values, basis = torch.linalg.eigh(projection, UPLO="U")
    # By the recurrence (see the module), the residual of Q_k y is q_{k+1} R times the last block of y.
    residuals = (coupling @ basis[-block:]).norm(dim=0)
    scale = float(values[-1])
    negligible = vectors * torch.finfo(dtype).eps * scale  # a coupling of this size is rounding: nothing new was found
    return Ends(
        largest=math.sqrt(max(scale, 0.0)),  # rounding may put an eigenvalue below 0
        smallest=math.sqrt(max(float(values[0]), 0.0)),
        largest_error=_relative_error(values, residuals, -1, -2),
        smallest_error=_relative_error(values, residuals, 0, 1),
        steps=vectors // block,
        exhausted=vectors >= size or float(coupling.abs().max()) <= negligible,
    )


def start_vectors(size: int, count: int, start: int) -> Tensor:
    """`(count, size)` orthonormal rows, fp64 on the CPU; two starts share no vector.

    Drawn on the CPU not on the matrix's device, so that a matrix has the same figures everywhere up to rounding.
    """
    rows = []
    for index in range(start * count, (start + 1) * count):
        generator = torch.Generator().manual_seed((_SEED + size + index * _NEXT_START) % 2**32)
        rows.append(torch.randn(size, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.linalg.qr(torch.stack(rows, dim=1)).Q.mT


def _relative_error(values: Tensor, residuals: Tensor, index: int, neighbor: int) -> float:
    r"""Error of a Ritz value $\sqrt\theta$ from the residual $\rho$ of $\theta$.

    The error of $\theta$ is at most $\rho$, and at most $\rho^2$ over the gap to the other eigenvalues (Parlett 1998,
    §11.7). The gap to the next Ritz value estimates that gap. The relative error of the root is half that of $\theta$.
    """
    value, residual = float(values[index]), float(residuals[index])
    if value <= 0.0:
        return math.inf
    gap = abs(float(values[neighbor]) - value) if len(values) > 1 else 0.0
    return 0.5 * (min(residual, residual**2 / gap) if gap else residual) / value
