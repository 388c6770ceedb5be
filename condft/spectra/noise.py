"""The noise of storage rounding: a singular value below it may come from the rounding, not from the weight."""

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["code_rounding_error", "rounding_noise"]

# Rounding to nearest has a uniform error of at most half a unit in the last place, eps * 2**floor(log2 |w|) / 2. Its
# root mean square is eps/2 / sqrt(3) * sqrt(E 4**floor(log2 |w|)). For normal entries that mean is 0.541 E w^2: summed
# over the binades, and between 0.46 and 0.56 as the scale of the entries shifts within a binade.
_FLOAT_ERROR = 0.5 / math.sqrt(3.0) * math.sqrt(0.541)
_SAMPLE = 2**16  # entries; they give the 1 % that `code_rounding_error` states


def rounding_noise(shape: tuple[int, int], precision: torch.dtype | float, frobenius_norm: float) -> float:
    r"""Spectral norm of the rounding of a matrix to its storage format, in the units of its entries.

    Rounding errors of different entries are independent to good approximation, and a random m x n matrix with entries
    of standard deviation s has spectral norm $s(\sqrt m + \sqrt n)$ (Bai & Yin 1993). A singular value below that
    may come from the rounding alone.

    Args:
        shape: `(m, n)` of the matrix.
        precision: Floating dtype of the stored matrix; for a quantized one the root mean square of its rounding
            errors relative to that of its entries (`code_rounding_error`).
        frobenius_norm: Frobenius norm of the matrix.

    >>> noise = rounding_noise((1024, 1024), torch.bfloat16, frobenius_norm=20.0)
    >>> round(noise, 4)
    0.0021
    """
    m, n = shape
    rms = frobenius_norm / math.sqrt(m * n)
    relative = _FLOAT_ERROR * torch.finfo(precision).eps if isinstance(precision, torch.dtype) else precision
    return relative * rms * (math.sqrt(m) + math.sqrt(n))


def code_rounding_error(codes: Tensor, group: int) -> float:
    """Relative rounding error of normal entries that share a scale in groups, each rounded to the nearest code.

    The scale of a group is its largest magnitude, which maps to the largest code. Found on a seeded sample, since no
    closed form holds for every code table.

    Args:
        codes: `(k,)`, the values of all codes before scaling, in any order.
        group: Number of entries that share a scale.

    Returns:
        Root mean square of the errors over that of the entries, to about 1 %.

    >>> int8 = torch.linspace(-1, 1, 255)
    >>> 0.005 < code_rounding_error(int8, group=64) < 0.01
    True
    """
    return _code_rounding_error(tuple(codes.detach().double().sort().values.tolist()), group)


@lru_cache(maxsize=64)
def _code_rounding_error(table: tuple[float, ...], group: int) -> float:
    """Cached by the code table: all layers of a model share one, and each of their units asks."""
    # dtype and device are given: the caller may have changed torch's defaults, and the figure must not follow.
    codes = torch.tensor(table, dtype=torch.float64, device="cpu")
    count = max(8, _SAMPLE // group)  # a group can be a whole row (bitsandbytes 8-bit): eight of them at least
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(count, group, generator=generator, dtype=torch.float64, device="cpu")
    scale = entries.abs().amax(1, keepdim=True) / codes.abs().max()
    above = torch.searchsorted(codes, entries / scale).clamp(1, len(codes) - 1)
    lower, upper = codes[above - 1], codes[above]
    # `codes` is sorted, so the nearest code is one of the two around the entry.
    nearest = torch.where(entries / scale - lower < upper - entries / scale, lower, upper)
    return float((nearest * scale - entries).square().mean().sqrt())
