"""Factorisations in double precision whose triangular factor has the singular values of a tall matrix."""

import torch
from torch import Tensor

from condft.spectra.operators import iter_row_blocks

__all__ = ["cholesky_factor", "qr_factor"]


def qr_factor(tall: Tensor) -> Tensor:
    """R of the QR factorisation of `(m, n)`, folding in one block of rows after the other.

    Sequential TSQR (Demmel et al. 2012): as backward stable as one QR of the whole, with extra memory of one block.

    Returns:
        `(n, n)` upper triangular, fp64; its singular values are the matrix's, to rounding at any condition number.
    """
    n = tall.shape[1]
    factor = torch.empty(0, n, dtype=torch.float64, device=tall.device)
    rows = max(2048, 2 * n)
    for start in range(0, tall.shape[0], rows):
        block = tall[start : start + rows].to(torch.float64)
        factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    return factor


def cholesky_factor(tall: Tensor) -> Tensor | None:
    r"""The upper Cholesky factor of $W^T W$ for `(m, n)`: half the work of a QR, and it squares the condition.

    Returns:
        `(n, n)` upper triangular, fp64, whose singular values are the matrix's to about $\kappa^2 \varepsilon_{64}$;
        None where $W^T W$ is not positive definite to rounding, which means a condition number above some 1e7.
    """
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for _, block in iter_row_blocks(tall, torch.float64):
        gram.addmm_(block.mT, block)
    factor, info = torch.linalg.cholesky_ex(gram, upper=True)
    return None if int(info) else factor
