"""Equal gain, rank correlations within types and over all, and a regression; each with its bootstrap interval.

Shapes: n tensors in their last dimension, and before it any number of bootstrap draws, done at once.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


def at_equal_gain(points: Sequence[tuple[float, float]], gain: float, *, power: float) -> float | None:
    """The damage of a tensor's update where its gain is `gain`.

    Between two points with gain and damage above 0 by a power law (a line in logarithms); outside them by the law
    of small updates, damage ~ gain ** power, from the nearest point.

    Args:
        points: (gain, damage), one a norm, in any order.
        gain: Above 0.
        power: 2 for a KL divergence, which has its minimum at the base; 1 for a cross-entropy.

    Returns:
        The damage; None if no point gained anything.
    """
    found = sorted(point for point in points if point[0] > 0)
    if not found:
        return None
    for (low, low_damage), (high, high_damage) in pairwise(found):
        if low <= gain <= high and low < high:
            share = math.log(gain / low) / math.log(high / low)
            if min(low_damage, high_damage) > 0:
                return low_damage * (high_damage / low_damage) ** share
            return low_damage + share * (high_damage - low_damage)
    nearest, damage = min(found, key=lambda point: abs(math.log(gain / point[0])))
    return damage * (gain / nearest) ** power


def rank_correlation(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Floats:
    """Spearman's correlation; within groups, of ranks that are taken and centerd in each.

    Args:
        x: `(..., n)`.
        y: The same shape.
        groups: `(n,)`; the ranks of a group are divided by its size, so that all groups weigh by their members alone.

    Returns:
        `(...)`, in [-1, 1]; nan where one side is constant.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    members = _members(groups, x.shape[-1])
    return _correlation(_ranks(x, members), _ranks(y, members))


def partial_rank_correlation(
    x: ArrayLike, y: ArrayLike, covariates: ArrayLike, groups: ArrayLike | None = None
) -> Floats:
    """The same, of what a linear fit on the covariates' ranks (`(k, ..., n)`) leaves of both sides' ranks."""
    x, y, others = np.asarray(x, float), np.asarray(y, float), np.asarray(covariates, float)
    members = _members(groups, x.shape[-1])
    basis, _ = np.linalg.qr(np.stack([_ranks(other, members) for other in others], axis=-1))
    left = []
    for side in (_ranks(x, members), _ranks(y, members)):
        explained = basis @ (np.swapaxes(basis, -1, -2) @ side[..., None])
        left.append(side - explained[..., 0])
    return _correlation(*left)


def bootstrap_draws(groups: ArrayLike, *, draws: int = 2000, seed: int = 0) -> NDArray[np.int64]:
    """Units drawn with replacement within each group: `(draws, n)` indices, each in a place of its own group."""
    labels = np.asarray(groups)
    index = np.empty((draws, len(labels)), dtype=np.int64)
    generator = np.random.default_rng(seed)
    for inside in _members(labels, len(labels)):
        index[:, inside] = generator.choice(inside, (draws, len(inside)))
    return index


def percentile_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % of a statistic's draws; draws that are nan do not count, and if all are, so are both ends."""
    found = np.asarray(values, float)
    if not np.isfinite(found).any():
        return math.nan, math.nan
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def standardised_coefficients(scores: ArrayLike, target: ArrayLike, depth: ArrayLike, groups: ArrayLike) -> Floats:
    """Least squares of a target on scores, with an intercept for each group, depth and its square as covariates.

    Args:
        scores: `(k, ..., n)`.
        target: `(..., n)`.
        depth: `(..., n)`, 0 to 1.
        groups: `(n,)`: the types; a type of one shape takes the shape with it.

    Returns:
        `(k, ...)`: standard deviations of the target per standard deviation of the score, both within groups.
    """
    scores, depth, target = np.asarray(scores, float), np.asarray(depth, float), np.asarray(target, float)
    members = _members(groups, target.shape[-1])
    columns = [_standardized(column, members) for column in (*scores, depth, depth**2)]
    # pinv, not a solve: a score that is constant, or that repeats another one, takes no part or half
    inverse = np.linalg.pinv(np.stack(columns, axis=-1))
    found = (inverse @ _standardized(target, members)[..., None])[..., 0]
    return np.moveaxis(found, -1, 0)[: len(scores)]


def thirds_ratio(score: ArrayLike, target: ArrayLike, groups: ArrayLike) -> Floats:
    """Geometric mean of the target over each group's third of lowest score, over that of the whole group, pooled.

    Args:
        score: `(..., n)`; the highest third is that of its negative.
        target: `(..., n)`, above 0.
        groups: `(n,)`.
    """
    score, logs = np.asarray(score, float), np.log(np.asarray(target, float))
    differences = []
    for inside in _members(groups, score.shape[-1]):
        mine = logs[..., inside]
        chosen = np.argsort(score[..., inside], axis=-1, kind="stable")[..., : max(1, len(inside) // 3)]
        differences.append(np.take_along_axis(mine, chosen, axis=-1).mean(axis=-1) - mine.mean(axis=-1))
    return np.exp(np.mean(differences, axis=0))


def _members(groups: ArrayLike | None, count: int) -> list[NDArray[np.int64]]:
    """Places of each group, the groups in order."""
    labels = np.zeros(count, int) if groups is None else np.asarray(groups)
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _ranks(values: Floats, members: Sequence[NDArray[np.int64]]) -> Floats:
    ranks = np.empty(values.shape)
    for inside in members:
        count = len(inside)
        ranks[..., inside] = (rankdata(values[..., inside], axis=-1) - (count + 1) / 2) / count
    return ranks


def _standardized(values: Floats, members: Sequence[NDArray[np.int64]]) -> Floats:
    result = values.copy()
    for inside in members:
        result[..., inside] -= values[..., inside].mean(axis=-1, keepdims=True)
    deviation = result.std(axis=-1, keepdims=True)
    return result / np.where(deviation > 0, deviation, 1.0)


def _correlation(x: Floats, y: Floats) -> Floats:
    size = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    # below: rounding of a side that is constant, or that the covariates explain wholly
    usable = size > 1e-12 * x.shape[-1]
    return np.where(usable, (x * y).sum(axis=-1) / np.where(usable, size, 1.0), math.nan)
