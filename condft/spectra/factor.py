"""Factorizations whose triangular factor has the singular values of a tall matrix, and the whole spectrum by SVD."""

import torch
from torch import Tensor

from condft.spectra.operators import iter_row_blocks

__all__ = [
    "cholesky_factor",
    "eigenvalues_above",
    "eigenvalues_below",
    "gram_matrix",
    "qr_factor",
    "singular_values",
]

_LEAST_WIDTH = 96  # narrower products do not reach the speed of wide ones


def qr_factor(tall: Tensor) -> Tensor:
    """R of the QR factorization of `(m, n)`, by blocks of rows: each is stacked under the R so far and factored.

    Sequential TSQR (Demmel et al. 2012): as backward stable as one QR of the whole, with extra memory of one block.

    Returns:
        `(n, n)` upper triangular, fp64; its singular values are the matrix's, to rounding at any condition number.
    """
    n = tall.shape[1]
    factor = torch.empty(0, n, dtype=torch.float64, device=tall.device)
    rows = max(2048, 2 * n)  # at least 2n: then the R so far is at most a third of what is factored again
    for start in range(0, tall.shape[0], rows):
        stacked = torch.cat([factor, tall[start : start + rows].to(torch.float64)])
        factor = torch.linalg.qr(stacked, mode="r").R  # Q is not formed: R alone has the singular values
        del stacked  # before the next block is made: two at a time would double the extra memory
    return factor


def gram_matrix(tall: Tensor, dtype: torch.dtype) -> Tensor:
    r"""$W^T W$ for `(m, n)`, in blocks of columns: only the lower triangle is computed, the upper one is its mirror.

    Returns:
        `(n, n)` of `dtype`, symmetric to rounding.
    """
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=dtype, device=tall.device)
    # Eight strips: with the upper triangles of their diagonal blocks, 9/16 of the square is computed.
    width = max(_LEAST_WIDTH, -(-n // 8))
    for _, rows in iter_row_blocks(tall, dtype):
        for start in range(0, n, width):
            stop = min(start + width, n)
            gram[start:, start:stop].addmm_(rows[:, start:].mT, rows[:, start:stop])
        del rows  # before the next block is made
    # The mirror by tiles, which fit the cache: in one piece it takes as long as a factorization.
    for start in range(0, n, width):
        for below in range(start + width, n, width):
            tile = gram[below : below + width, start : start + width]
            gram[start : start + width, below : below + width] = tile.contiguous().mT.contiguous()
    return gram


def cholesky_factor(gram: Tensor) -> Tensor | None:
    """The Cholesky factor of a symmetric matrix, read from its lower triangle (LAPACK is slower with the upper one).

    Returns:
        `(n, n)` lower triangular; None where the matrix is not positive definite to rounding.
    """
    # Not `cholesky`, which raises: that a matrix is not definite is an expected answer here.
    factor, info = torch.linalg.cholesky_ex(gram)
    return None if int(info) else factor


def eigenvalues_above(gram: Tensor, bound: float) -> bool:
    r"""Whether every eigenvalue of a symmetric matrix is above a bound, by Sylvester's law of inertia.

    $G - bI$ is positive definite exactly if it has a Cholesky factor (Golub & Van Loan, §4.2, §8.4.2), up to rounding
    of some $\varepsilon \lambda_{\max}$. A Krylov process cannot prove this: it does not see an eigenvector of which
    its start vector holds next to nothing. `gram` is changed in place and restored before the return.
    """
    diagonal = gram.diagonal()
    before = diagonal.clone()
    # In place: a shifted copy would be a third (n, n) matrix, next to this one and its factor.
    diagonal -= bound
    definite = cholesky_factor(gram) is not None
    diagonal.copy_(before)  # not `+= bound`, which would leave rounding on the diagonal
    return definite


def eigenvalues_below(gram: Tensor, bound: float) -> bool:
    """Whether every eigenvalue is below a bound; see `eigenvalues_above`."""
    # All eigenvalues of G are below b exactly if those of -G are above -b. A second negation restores every bit.
    definite = eigenvalues_above(gram.neg_(), -bound)
    gram.neg_()
    return definite


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values by a backward-stable SVD in fp64: the slowest route, and the reference of the tests.

    A tall matrix is reduced to its triangular factor before the SVD (Golub & Van Loan, §8.6.3), a wide one transposed.

    Args:
        matrix: `(m, k)`, any floating dtype.

    Returns:
        `(min(m, k),)`, fp64, descending, on the matrix's device.

    >>> import torch
    >>> singular_values(torch.diag(torch.tensor([1.0, 4.0, 2.0])))
    tensor([4., 2., 1.], dtype=torch.float64)
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    # A QR costs 2mn^2 operations but leaves an (n, n) SVD: it pays from an aspect of about two.
    working = qr_factor(tall) if tall.shape[0] > 2 * tall.shape[1] else tall.to(torch.float64)
    return torch.linalg.svdvals(working)
