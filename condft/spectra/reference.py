"""The last word, and the reference of the tests: the whole spectrum by a backward-stable SVD in double precision."""

import torch
from torch import Tensor

from condft.spectra.factor import qr_factor

__all__ = ["singular_values"]


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a real matrix `(m, k)` of any floating dtype.

    A tall matrix is reduced to its triangular factor before the SVD (Golub & Van Loan, §8.6.3), a wide one transposed.

    Returns:
        `(min(m, k),)`, fp64, descending, on the matrix's device.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    working = qr_factor(tall) if tall.shape[0] > 2 * tall.shape[1] else tall.to(torch.float64)
    return torch.linalg.svdvals(working)
