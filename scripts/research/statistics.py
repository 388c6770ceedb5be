"""What all experiments share: rank correlations, shares of variance, and bootstrap intervals.

Shapes: n weights (or values) in the last dimension, and before it any number of bootstrap draws, computed at once.
Ranks come from scipy, and so does the bootstrap of a mean and of a ratio. Two things are our own, because scipy 1.17
does not have them: ranks that are taken within groups, and draws that stay within groups (a stratified bootstrap).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata

__all__ = [
    "Floats",
    "bootstrap_draws",
    "explained_by_chance",
    "explained_by_groups",
    "mean_interval",
    "members_of",
    "partial_rank_correlation",
    "percentile_interval",
    "rank_correlation",
    "ratio_draws",
    "spread_within",
]

Floats = NDArray[np.float64]


def rank_correlation(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Floats:
    """Spearman's correlation; within groups, of ranks that are taken and centered in each group.

    Without groups it is that of `scipy.stats.spearmanr`, for many draws at once.

    Args:
        x: `(..., n)`.
        y: The same shape.
        groups: `(n,)`; the ranks of a group are divided by its size, so that a group counts by its members alone.

    Returns:
        `(...)`, in [-1, 1]; nan where one side is constant.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    members = members_of(groups, x.shape[-1])
    return _correlation(_ranks(x, members), _ranks(y, members))


def partial_rank_correlation(
    x: ArrayLike, y: ArrayLike, covariates: ArrayLike, groups: ArrayLike | None = None
) -> Floats:
    """The rank correlation of what a linear fit on the covariates' ranks leaves of the ranks of both sides.

    Args:
        x: `(..., n)`.
        y: The same shape.
        covariates: `(k, ..., n)`.
        groups: As of `rank_correlation`.
    """
    x, y, others = np.asarray(x, float), np.asarray(y, float), np.asarray(covariates, float)
    members = members_of(groups, x.shape[-1])
    # the projection by QR: normal equations would square the condition number of nearly collinear covariates
    basis, _ = np.linalg.qr(np.stack([_ranks(other, members) for other in others], axis=-1))
    left = []
    for side in (_ranks(x, members), _ranks(y, members)):
        explained = basis @ (np.swapaxes(basis, -1, -2) @ side[..., None])
        left.append(side - explained[..., 0])
    return _correlation(*left)


def explained_by_groups(values: ArrayLike, groups: ArrayLike) -> Floats:
    r"""$\eta^2$: the share of the values' variance that is between the groups' means (Fisher 1925).

    Args:
        values: `(..., n)`.
        groups: `(n,)`, any labels.

    Returns:
        `(...)`, in [0, 1]; nan where the values are constant. For chance see `explained_by_chance`.
    """
    column, labels = np.asarray(values, float), np.asarray(groups)
    centered = column - column.mean(axis=-1, keepdims=True)
    between = np.zeros(column.shape[:-1])
    for label in np.unique(labels):
        inside = centered[..., labels == label]
        between += inside.shape[-1] * inside.mean(axis=-1) ** 2
    total = (centered**2).sum(axis=-1)
    return np.divide(between, total, out=np.full_like(between, math.nan), where=total > 0)


def explained_by_chance(groups: ArrayLike) -> float:
    r"""Mean $\eta^2$ of as many groups of the same sizes drawn at random: (groups - 1) / (n - 1)."""
    labels = np.asarray(groups)
    return (len(np.unique(labels)) - 1) / (len(labels) - 1)


def spread_within(values: ArrayLike, groups: ArrayLike) -> float:
    """Standard deviation within groups, pooled: each group's mean costs a degree of freedom."""
    column, labels = np.asarray(values, float), np.asarray(groups)
    members = [column[labels == label] for label in np.unique(labels)]
    squares = sum(float(((inside - inside.mean()) ** 2).sum()) for inside in members)
    return math.sqrt(squares / (len(column) - len(members)))


def bootstrap_draws(groups: ArrayLike, *, draws: int = 2000, seed: int = 0) -> NDArray[np.int64]:
    """Draws with replacement within each group: `(draws, n)` indices, each at a position of its own group.

    `scipy.stats.bootstrap` has no strata: it would draw across the groups.
    """
    labels = np.asarray(groups)
    index = np.empty((draws, len(labels)), dtype=np.int64)
    generator = np.random.default_rng(seed)
    for inside in members_of(labels, len(labels)):
        index[:, inside] = generator.choice(inside, (draws, len(inside)))
    return index


def percentile_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % of a statistic's draws; draws that are nan do not count, and if all are, so are both ends."""
    found = np.asarray(values, float)
    if not np.isfinite(found).any():
        return math.nan, math.nan
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval; both ends nan for a single value.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array[0]), math.nan, math.nan
    generator = np.random.default_rng(seed)
    found = bootstrap((array,), np.mean, n_resamples=draws, method="percentile", rng=generator)
    low, high = found.confidence_interval
    return float(array.mean()), float(low), float(high)


def ratio_draws(numerators: Floats, denominators: Floats, *, draws: int, seed: int) -> Floats:
    """`(draws,)`: bootstrap draws of a ratio of means over pairs; inf where the denominator's mean is not above 0."""

    def ratio(top: Floats, bottom: Floats, axis: int = -1) -> Floats:
        top, bottom = top.mean(axis=axis), bottom.mean(axis=axis)
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.inf)

    generator = np.random.default_rng(seed)
    pairs = (numerators, denominators)
    # scipy's own interval interpolates between inf and a finite draw (nan); only its draws are used
    with np.errstate(invalid="ignore"):
        found = bootstrap(
            pairs, ratio, paired=True, vectorized=True, n_resamples=draws, method="percentile", rng=generator
        )
    distribution: Floats = found.bootstrap_distribution
    return distribution


def members_of(groups: ArrayLike | None, count: int) -> list[NDArray[np.int64]]:
    """The positions of each group, the groups in order; one group of all if None."""
    labels = np.zeros(count, int) if groups is None else np.asarray(groups)
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _ranks(values: Floats, members: Sequence[NDArray[np.int64]]) -> Floats:
    ranks = np.empty(values.shape)
    for inside in members:
        count = len(inside)
        ranks[..., inside] = (rankdata(values[..., inside], axis=-1) - (count + 1) / 2) / count
    return ranks


def _correlation(x: Floats, y: Floats) -> Floats:
    """Pearson's, of sides that are centered. Not scipy's, which takes the rounding below for a signal."""
    size = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    # less is rounding of a side that is constant, or that the covariates explain wholly
    usable = size > 1e-12 * x.shape[-1]
    return np.where(usable, (x * y).sum(axis=-1) / np.where(usable, size, 1.0), math.nan)
