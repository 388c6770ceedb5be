"""What storage rounding hides: the singular values that the rounding's own noise could have made."""

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["code_rounding_error", "rounding_noise"]

# Rounding to nearest errs uniformly by half a unit in the last place, eps * 2**floor(log2 |w|) / 2: in the root mean
# square eps/2 / sqrt(3) * sqrt(E 4**floor(log2 |w|)), and that mean is 0.541 E w^2 for normal entries (summed over the
# binades; between 0.46 and 0.56 as their scale shifts within one).
_FLOAT_ERROR = 0.5 / math.sqrt(3.0) * math.sqrt(0.541)
_SAMPLE = 2**16


def rounding_noise(shape: tuple[int, int], precision: torch.dtype | float, frobenius_norm: float) -> float:
    r"""Spectral norm of the rounding of a matrix to its storage format, in the units of its entries.

    Rounding errors of different entries are independent to good approximation, and a random m x n matrix with entries
    of standard deviation s has spectral norm $s(\sqrt m + \sqrt n)$ (Bai & Yin 1993). A singular value below that
    may be the rounding's and not the weight's.

    Args:
        shape: `(m, n)` of the matrix.
        precision: Floating dtype that it is stored in; or, for a quantized one, the root mean square of its rounding
            errors relative to that of its entries (`code_rounding_error`).
        frobenius_norm: Its Frobenius norm.
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
        codes: `(k,)` the values that a code can stand for, before scaling; any order.
        group: How many entries share a scale.

    Returns:
        Root mean square of the errors over that of the entries, to about 1 %.
    """
    return _code_rounding_error(tuple(codes.detach().double().sort().values.tolist()), group)


@lru_cache(maxsize=64)
def _code_rounding_error(table: tuple[float, ...], group: int) -> float:
    """Once a code table: the layers of a model share theirs, and are looked at again and again."""
    codes = torch.tensor(table, dtype=torch.float64, device="cpu")
    count = max(8, _SAMPLE // group)
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(count, group, generator=generator, dtype=torch.float64, device="cpu")
    scale = entries.abs().amax(1, keepdim=True) / codes.abs().max()
    above = torch.searchsorted(codes, entries / scale).clamp(1, len(codes) - 1)
    lower, upper = codes[above - 1], codes[above]
    nearest = torch.where(entries / scale - lower < upper - entries / scale, lower, upper)
    return float((nearest * scale - entries).square().mean().sqrt())
