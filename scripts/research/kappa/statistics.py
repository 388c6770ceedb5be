"""What groups explain of a column, how much of a ranking stays, and how rare a square matrix's κ is."""

import math

import numpy as np
from numpy.typing import ArrayLike

from condft.selection.random_matrix import edelman_cdf
from scripts.research.statistics import Floats


def explained_by_groups(values: ArrayLike, groups: ArrayLike) -> Floats:
    r"""$\eta^2$: the share of the values' variance that lies between the groups' means (Fisher 1925).

    Args:
        values: `(..., n)`.
        groups: `(n,)`, any labels.

    Returns:
        `(...)`, in [0, 1]; nan where the values are constant. For chance see `explained_by_chance`.
    """
    column, labels = np.asarray(values, float), np.asarray(groups)
    centerd = column - column.mean(axis=-1, keepdims=True)
    between = np.zeros(column.shape[:-1])
    for label in np.unique(labels):
        inside = centerd[..., labels == label]
        between += inside.shape[-1] * inside.mean(axis=-1) ** 2
    total = (centerd**2).sum(axis=-1)
    return np.divide(between, total, out=np.full_like(between, math.nan), where=total > 0)


def explained_by_chance(groups: ArrayLike) -> float:
    r"""Mean $\eta^2$ of as many groups of the same sizes drawn at random: (groups - 1) / (n - 1)."""
    labels = np.asarray(groups)
    return (len(np.unique(labels)) - 1) / (len(labels) - 1)


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
    low, high = 1e-3, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if edelman_cdf(middle) < probability else (low, middle)
    return math.sqrt(low * high)


def random_square_spread(points: int = 1000) -> float:
    """Standard deviation of log κ over random squares, nats: about 1.12 (the quantiles' midpoints)."""
    return float(np.std([math.log(square_ratio((index + 0.5) / points)) for index in range(points)]))


def spread_within(values: ArrayLike, groups: ArrayLike) -> float:
    """Standard deviation within groups, pooled: each group's mean costs a degree of freedom."""
    column, labels = np.asarray(values, float), np.asarray(groups)
    members = [column[labels == label] for label in np.unique(labels)]
    squares = sum(float(((inside - inside.mean()) ** 2).sum()) for inside in members)
    return math.sqrt(squares / (len(column) - len(members)))
