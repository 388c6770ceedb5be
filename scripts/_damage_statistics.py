"""Equal gain, rank correlations within types and over all, and a regression; each with its bootstrap interval."""

import math
from collections.abc import Callable, Sequence
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


def rank_correlation(x: ArrayLike, y: ArrayLike, groups: Sequence[str] | None = None) -> float:
    """Spearman's correlation; within groups, of ranks that are taken and centred in each.

    Args:
        x: Values.
        y: As many.
        groups: Of each value; the ranks of a group are divided by its size, so that all weigh alike by member.

    Returns:
        A float in [-1, 1]; nan where one side is constant.
    """
    labels = np.asarray(groups if groups is not None else [""] * len(np.asarray(x)))
    return _correlation(_ranks(np.asarray(x, float), labels), _ranks(np.asarray(y, float), labels))


def partial_rank_correlation(
    x: ArrayLike, y: ArrayLike, covariates: ArrayLike, groups: Sequence[str] | None = None
) -> float:
    """The same, of what is left of both sides' ranks after a linear fit on the covariates' (`(num_values, k)`)."""
    x, y, others = np.asarray(x, float), np.asarray(y, float), np.asarray(covariates, float)
    labels = np.asarray(groups if groups is not None else [""] * len(x))
    basis = np.column_stack([_ranks(column, labels) for column in others.T])
    left = [side - basis @ np.linalg.lstsq(basis, side)[0] for side in (_ranks(x, labels), _ranks(y, labels))]
    return _correlation(*left)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], groups: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a statistic over units drawn with replacement within each group.

    Args:
        statistic: From indices (with repetitions) to a number; draws that give nan do not count.
        groups: Of each unit.
        draws: How many.
        seed: Of the draws.
    """
    labels = np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in sorted(set(groups))]
    generator = np.random.default_rng(seed)
    drawn = (np.concatenate([generator.choice(unit, len(unit)) for unit in members]) for _ in range(draws))
    values = np.array([statistic(index) for index in drawn])
    if not np.isfinite(values).any():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def standardised_coefficients(scores: ArrayLike, target: ArrayLike, depth: ArrayLike, groups: Sequence[str]) -> Floats:
    """Least squares of a target on scores, with an intercept for each group, depth and its square as covariates.

    Args:
        scores: `(num_units, k)`.
        target: `(num_units,)`.
        depth: 0 to 1.
        groups: The types; a type of one shape takes the shape with it.

    Returns:
        `(k,)`: standard deviations of the target per standard deviation of the score, both within groups.
    """
    labels, depth = np.asarray(groups), np.asarray(depth, float)
    columns = np.column_stack([np.asarray(scores, float), depth, depth**2])
    columns, goal = _centred(columns, labels), _centred(np.asarray(target, float)[:, None], labels)[:, 0]
    scale = columns.std(axis=0)
    scale[scale == 0] = 1.0
    k = columns.shape[1] - 2
    return np.asarray(np.linalg.lstsq(columns / scale, goal / (goal.std() or 1.0))[0][:k])


def _ranks(values: Floats, labels: NDArray[np.str_]) -> Floats:
    ranks = np.empty(len(values))
    for label in set(labels.tolist()):
        inside = labels == label
        count = inside.sum()
        ranks[inside] = (rankdata(values[inside]) - (count + 1) / 2) / count
    return ranks


def _centred(columns: Floats, labels: NDArray[np.str_]) -> Floats:
    result = columns.copy()
    for label in set(labels.tolist()):
        inside = labels == label
        result[inside] -= columns[inside].mean(axis=0)
    return result


def _correlation(x: Floats, y: Floats) -> float:
    size = math.sqrt(float(x @ x) * float(y @ y))
    # below: rounding of a side that is constant, or that the covariates explain wholly
    return float(x @ y) / size if size > 1e-12 * len(x) else math.nan
