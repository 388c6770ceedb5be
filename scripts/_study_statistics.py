"""Reading forgetting off at equal adaptation, and what several seeds say about a ratio. Pure logic, and numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


def value_at_level(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """The second coordinate where the first one first falls to `level`, linear between the points of a run.

    Args:
        curve: (loss, value) in the order of the steps. The loss need not fall at every point.
        level: Where to read.

    Returns:
        The value; that of the first point if the run starts at or below the level; None if it never gets there.
    """
    if curve and curve[0][0] <= level:
        return curve[0][1]
    for (loss, value), (next_loss, next_value) in pairwise(curve):
        if next_loss <= level < loss:
            share = (loss - level) / (loss - next_loss)
            return value + share * (next_value - value)
    return None


@dataclass(frozen=True)
class Ratio:
    """A ratio of means over paired seeds.

    Attributes:
        value: Mean of the numerators over mean of the denominators; nan if the latter is not positive.
        low: Lower end of the 95 % interval; nan with fewer than 2 seeds or where draws had no ratio.
        high: Upper end.
        num_seeds: Pairs.
        effect_size: Mean of the paired differences over their standard deviation (Cohen's d_z); nan with fewer
            than 2 seeds.
    """

    value: float
    low: float
    high: float
    num_seeds: int
    effect_size: float


def paired_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, draws: int = 10_000, seed: int = 0
) -> Ratio:
    """Ratio of means with a percentile bootstrap over seeds: a draw takes seeds with replacement, both arms of each.

    Of means, not the mean of ratios: a change of cross-entropy may be near 0 or negative for a single seed. An
    interval whose draws include a denominator that is not positive has no upper end (`inf`).

    Args:
        numerators: One value a seed.
        denominators: The other arm's, of the same seeds.
        draws: Bootstrap draws.
        seed: Of the draws.

    Raises:
        ValueError: Not one value each for at least one seed.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} and {len(denominators)} values: needs one of each for at least one seed")
    ours, theirs = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    value = float(ours.mean() / theirs.mean()) if theirs.mean() > 0 else math.nan
    if len(ours) < 2:
        return Ratio(value, math.nan, math.nan, len(ours), math.nan)
    index = np.random.default_rng(seed).integers(len(ours), size=(draws, len(ours)))
    top, bottom = ours[index].mean(axis=1), theirs[index].mean(axis=1)
    ratios = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.inf)
    # "lower" keeps an infinite draw from being averaged with a finite one
    low, high = np.quantile(ratios, [0.025, 0.975], method="lower")
    difference = ours - theirs
    spread = float(difference.std(ddof=1))
    effect = float(difference.mean()) / spread if spread > 0 else math.nan
    return Ratio(value, float(low), float(high), len(ours), effect)


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
    index = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    low, high = np.quantile(array[index].mean(axis=1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)
