"""Damage at equal gain, and what a score of the tensor says about it: a regression, and thirds.

Shapes: n tensors in their last dimension, and before it any number of bootstrap draws, computed at once.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scripts.research.statistics import Floats, members_of

__all__ = ["at_equal_gain", "standardized_coefficients", "thirds_ratio"]


def at_equal_gain(points: Sequence[tuple[float, float]], gain: float, *, power: float) -> float | None:
    """The damage of a tensor's update at the size where its gain is `gain`.

    Between two points with gain and damage above 0 by a power law (a line in logarithms); outside them by the law
    of small updates, damage ~ gain ** power, from the nearest point.

    Args:
        points: (gain, damage), one for each norm, in any order.
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
            # A damage that is not above 0 has no logarithm: linear instead.
            return low_damage + share * (high_damage - low_damage)
    nearest, damage = min(found, key=lambda point: abs(math.log(gain / point[0])))
    return damage * (gain / nearest) ** power


def standardized_coefficients(scores: ArrayLike, target: ArrayLike, depth: ArrayLike, groups: ArrayLike) -> Floats:
    """Least squares of a target on scores, with an intercept for each group, depth and its square as covariates.

    Args:
        scores: `(k, ..., n)`.
        target: `(..., n)`.
        depth: `(..., n)`, 0 to 1.
        groups: `(n,)`: the types; a type has one shape, so the shape is a covariate too.

    Returns:
        `(k, ...)`: standard deviations of the target per standard deviation of the score, both within groups.
    """
    scores, depth, target = np.asarray(scores, float), np.asarray(depth, float), np.asarray(target, float)
    members = members_of(groups, target.shape[-1])
    columns = [_standardized(column, members) for column in (*scores, depth, depth**2)]
    # pinv, not a solve: a constant score then gets coefficient 0, and two equal scores share theirs
    inverse = np.linalg.pinv(np.stack(columns, axis=-1))
    found = (inverse @ _standardized(target, members)[..., None])[..., 0]
    return np.moveaxis(found, -1, 0)[: len(scores)]


def thirds_ratio(score: ArrayLike, target: ArrayLike, groups: ArrayLike) -> Floats:
    """Geometric mean of the target over each group's third of lowest score, over that of the whole group, pooled.

    Args:
        score: `(..., n)`; for the highest third give its negative.
        target: `(..., n)`, above 0.
        groups: `(n,)`.
    """
    score, logs = np.asarray(score, float), np.log(np.asarray(target, float))
    differences = []
    for inside in members_of(groups, score.shape[-1]):
        mine = logs[..., inside]
        chosen = np.argsort(score[..., inside], axis=-1, kind="stable")[..., : max(1, len(inside) // 3)]
        differences.append(np.take_along_axis(mine, chosen, axis=-1).mean(axis=-1) - mine.mean(axis=-1))
    return np.exp(np.mean(differences, axis=0))


def _standardized(values: Floats, members: Sequence[NDArray[np.int64]]) -> Floats:
    result = values.copy()
    for inside in members:
        result[..., inside] -= values[..., inside].mean(axis=-1, keepdims=True)
    deviation = result.std(axis=-1, keepdims=True)
    return result / np.where(deviation > 0, deviation, 1.0)
