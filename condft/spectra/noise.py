"""What storage rounding hides: the singular values that a dtype's own noise could have made."""

import math

import torch

__all__ = ["rounding_noise"]

# Rounding to nearest errs uniformly by half a unit in the last place, eps * 2**floor(log2 |w|) / 2: in the root mean
# square eps/2 / sqrt(3) * sqrt(E 4**floor(log2 |w|)), and that mean is 0.541 E w^2 for normal entries (summed over the
# binades; between 0.46 and 0.56 as their scale shifts within one).
_RELATIVE_ERROR = 0.5 / math.sqrt(3.0) * math.sqrt(0.541)


def rounding_noise(shape: tuple[int, int], dtype: torch.dtype, frobenius_norm: float) -> float:
    r"""Spectral norm of the rounding of a matrix to its storage dtype, in the units of its entries.

    Rounding errors of different entries are independent to good approximation, and a random m x n matrix with entries
    of standard deviation s has spectral norm $s(\sqrt m + \sqrt n)$ (Bai & Yin 1993). A singular value below that
    may be the rounding's and not the weight's.

    Args:
        shape: `(m, n)` of the matrix.
        dtype: Floating dtype that it is stored in.
        frobenius_norm: Its Frobenius norm.
    """
    m, n = shape
    rms = frobenius_norm / math.sqrt(m * n)
    return _RELATIVE_ERROR * torch.finfo(dtype).eps * rms * (math.sqrt(m) + math.sqrt(n))
