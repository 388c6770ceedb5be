"""How much of a ranking stays, and how rare a square matrix's κ is among random ones (Edelman 1988)."""

import math

import numpy as np
from numpy.typing import ArrayLike

from condft.selection.random_matrix import edelman_cdf
from scripts.research.statistics import Floats


def kept_of_lowest(before: ArrayLike, after: ArrayLike, groups: ArrayLike, *, share: float = 0.1) -> tuple[int, int]:
    """How many of each group's lowest values are among its lowest afterwards; all groups together.

    Args:
        before: `(n,)`.
        after: `(n,)`.
        groups: `(n,)`; a group of m has max(1, round(share · m)) lowest, ties in their order here. Groups of one
            member do not count.
        share: In (0, 1).

    Returns:
        (kept, all that could be).
    """
    first, second, labels = np.asarray(before, float), np.asarray(after, float), np.asarray(groups)
    kept = total = 0
    for label in np.unique(labels):
        inside = np.flatnonzero(labels == label)
        if len(inside) < 2:
            continue
        count = max(1, round(share * len(inside)))
        lowest = [set(np.argsort(column[inside], kind="stable")[:count].tolist()) for column in (first, second)]
        kept, total = kept + len(lowest[0] & lowest[1]), total + count
    return kept, total


def square_quantiles(condition_numbers: ArrayLike, sizes: ArrayLike) -> Floats:
    """Share of random square matrices whose κ is lower (Edelman 1988), matrix by matrix: uniform if they are random.

    Args:
        condition_numbers: `(n,)`, of square matrices.
        sizes: `(n,)`, their sides.
    """
    ratios = np.asarray(condition_numbers, float) / np.asarray(sizes, float)
    return np.array([edelman_cdf(float(ratio)) for ratio in ratios])


def square_ratio(probability: float) -> float:
    """κ/n that this share of random squares lies under (`edelman_cdf` inverted by bisection)."""
    # Halved in logarithms, because the range has 12 decades. 100 halvings are more than a double resolves.
    low, high = 1e-3, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if edelman_cdf(middle) < probability else (low, middle)
    return math.sqrt(low * high)


def random_square_spread(points: int = 1000) -> float:
    """Standard deviation of log κ over random squares, nats: about 1.12 (the quantiles' midpoints)."""
    return float(np.std([math.log(square_ratio((index + 0.5) / points)) for index in range(points)]))
