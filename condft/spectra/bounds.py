r"""Golub-Kahan-Lanczos bidiagonalization: a lower bound of the condition number from products with the matrix alone.

From one start vector, $A V_k = U_k B_k$ and $A^T U_k = V_k B_k^T + \beta_{k+1} v_{k+1} e_k^T$ with $B_k$ upper
bidiagonal (Golub & Van Loan, §10.4). The singular values of $B_k$ lie within the spectrum, so their ratio is always a
lower bound of the condition number. Small singular values of $B_k$ keep their digits in single precision; small
eigenvalues of a projection of $A^T A$ would not, since squaring halves the number of digits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from condft.spectra.lanczos import start_vectors
from condft.spectra.operators import iter_row_blocks, times_columns, times_rows

__all__ = ["iter_ritz_values"]

_FIRST_LOOK = 4
_LOOKS = 6  # the next look comes after 1/6 of the steps so far, at least two: each costs a small SVD


def iter_ritz_values(tall: Tensor, dtype: torch.dtype, max_steps: int) -> Iterator[tuple[float, float]]:
    """Yields the largest and the smallest Ritz value after some of the steps, always after the last one.

    Each right vector is orthogonalized against all earlier ones, twice. That alone keeps the left vectors orthogonal
    enough (Simon & Zha 2000), which saves half the work. The process ends early where it finds an invariant subspace.

    Args:
        tall: `(m, n)`, m >= n, any floating dtype.
        dtype: To work in.
        max_steps: Products with the matrix, and as many with its transpose; n at most.

    Yields:
        `(largest, smallest)`: the first never above sigma_1, the second never below sigma_n, up to rounding.
    """
    n = tall.shape[1]
    max_steps = min(max_steps, n)  # after n steps the right vectors span the whole space
    basis = torch.empty(max_steps + 1, n, dtype=dtype, device=tall.device)
    # A fixed start: a matrix has the same bound on every process and in every run.
    basis[0] = start_vectors(n, 1, 0)[0].to(basis)
    left = _product(tall, basis[0])
    # Tensors, not floats: a float would make the host wait for the device at every step.
    alphas, betas = [left.norm()], []
    next_look = min(_FIRST_LOOK, max_steps)
    for step in range(1, max_steps + 1):
        left = left / alphas[-1]
        known = basis[:step]
        right = _transposed_product(tall, left).sub_(alphas[-1] * known[-1])
        for _ in range(2):  # twice is enough (Parlett 1998, §6.9): the second pass removes what rounding left
            right.addmv_(known.mT, known @ right, alpha=-1)
        betas.append(right.norm())
        if step == next_look:
            largest, smallest, exhausted = _extremes(alphas, betas)
            yield largest, smallest
            if exhausted or step == max_steps:
                return
            next_look = min(step + max(2, step // _LOOKS), max_steps)
        # betas[-1] may be 0 (an invariant subspace). What follows is then NaN, and the next look cuts it off.
        torch.div(right, betas[-1], out=basis[step])
        left = _product(tall, basis[step]).sub_(betas[-1] * left)
        alphas.append(left.norm())


def _extremes(alphas: list[Tensor], betas: list[Tensor]) -> tuple[float, float, bool]:
    """Ends of the bidiagonal matrix, and whether it belongs to an invariant subspace: later steps would be noise."""
    eps = torch.finfo(alphas[0].dtype).eps
    # One copy from the device for all of them. In fp64, so that the SVD below adds no rounding that matters.
    scalars = torch.stack([*alphas, *betas]).double().cpu()
    diagonal, off = scalars[: len(alphas)], scalars[len(alphas) :]
    # A coupling at the level of rounding splits the matrix: what follows it has nothing to do with the start vector.
    negligible = torch.arange(1, len(alphas) + 1, device="cpu") * eps * diagonal.cummax(0).values
    found = (off <= negligible).nonzero()
    count = int(found[0]) + 1 if len(found) else len(alphas)
    values = torch.linalg.svdvals(torch.diag(diagonal[:count]) + torch.diag(off[: count - 1], 1))
    return float(values[0]), float(values[-1]), len(found) > 0


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    blocks = iter_row_blocks(matrix, vector.dtype)
    return torch.cat([times_columns(vector[None], block)[0] for _, block in blocks])


def _transposed_product(matrix: Tensor, vector: Tensor) -> Tensor:
    total = vector.new_zeros(matrix.shape[1])
    for start, block in iter_row_blocks(matrix, vector.dtype):
        total += times_rows(vector[None, start : start + len(block)], block)[0]
    return total
