"""Reading forgetting off at equal adaptation, and what several seeds say about a ratio. Pure logic, and numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scripts.research.statistics import ratio_draws


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
        numerators: One value for each seed.
        denominators: The other arm's, of the same seeds.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: Not one value each for at least one seed.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} and {len(denominators)} values: needs one of each for at least one seed")
    ours, theirs = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    value = float(ours.mean() / theirs.mean()) if theirs.mean() > 0 else math.nan
    if len(ours) < 2:
        return Ratio(value, math.nan, math.nan, len(ours), math.nan)
    ratios = ratio_draws(ours, theirs, draws=draws, seed=seed)
    # "lower" keeps an infinite draw from being averaged with a finite one
    low, high = np.quantile(ratios, [0.025, 0.975], method="lower")
    difference = ours - theirs
    spread = float(difference.std(ddof=1))
    effect = float(difference.mean()) / spread if spread > 0 else math.nan
    return Ratio(value, float(low), float(high), len(ours), effect)


@dataclass(frozen=True)
class Across:
    """Ratios of means over paired seeds at several levels, taken together.

    Attributes:
        value: Geometric mean over the levels; nan if there is none.
        low: Lower end of its 95 % interval by a bootstrap over seeds; nan with fewer than 2 seeds.
        high: Upper end.
        least: The lowest ratio at any level.
        most: The highest.
        num_levels: Levels with a ratio: some seed has both arms there, and both means are above 0.
        num_seeds: (fewest, most) pairs at these levels.
    """

    value: float
    low: float
    high: float
    least: float
    most: float
    num_levels: int
    num_seeds: tuple[int, int]


def lowest_at_level(runs: Sequence[Sequence[tuple[float, float]]], level: float) -> float:
    """Of several runs (an arm's rates) the least value where they fall to a level; nan if none gets there."""
    values = [value for run in runs if (value := value_at_level(run, level)) is not None]
    return min(values, default=math.nan)


def level_ratios(numerators: np.ndarray, denominators: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """(levels,): ratio of means over the seeds where neither is nan; nan where a mean is not above 0 or there is none.

    Args:
        numerators: (levels, seeds).
        denominators: Likewise.
        times: (seeds,): how often each seed counts; once if None.
    """
    there = ~(np.isnan(numerators) | np.isnan(denominators))
    weights = np.ones(there.shape[1]) if times is None else times
    top, bottom = np.where(there, numerators, 0.0) @ weights, np.where(there, denominators, 0.0) @ weights
    return np.divide(top, bottom, out=np.full(len(top), math.nan), where=(bottom > 0) & (top > 0))


def ratio_across(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Across:
    """What one arm forgets over another, as a geometric mean over levels of adaptation.

    At a single level a ratio jumps where a run stops just short of it and the arm's next rate has to count; over
    many levels such jumps average out, and `least` and `most` show them.

    Args:
        numerators: (levels, seeds); nan where the arm does not get there.
        denominators: The other arm's, of the same levels and seeds.
        draws: Bootstrap draws over seeds, both arms of each.
        seed: Seed of the draws.

    Raises:
        ValueError: Not two matrices of one shape.
    """
    ours, theirs = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(f"{ours.shape} and {theirs.shape}: needs two matrices of levels by seeds, of one shape")
    found = level_ratios(ours, theirs)
    used = ~np.isnan(found)
    if not used.any():
        return Across(math.nan, math.nan, math.nan, math.nan, math.nan, 0, (0, 0))
    there = ~(np.isnan(ours) | np.isnan(theirs))[used]
    pairs, num_seeds = there.sum(axis=1), ours.shape[1]
    low = high = math.nan
    if there.any(axis=0).sum() > 1:
        picks = np.random.default_rng(seed).multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)
        drawn = [level_ratios(ours, theirs, times) for times in picks]
        # a draw of seeds that never get there says nothing
        means = [_geometric_mean(ratios) for ratios in drawn if not np.isnan(ratios).all()]
        low, high = np.quantile(means, [0.025, 0.975])
    spread = float(np.nanmin(found)), float(np.nanmax(found))
    seeds = int(pairs.min()), int(pairs.max())
    return Across(_geometric_mean(found), float(low), float(high), *spread, int(used.sum()), seeds)


def _geometric_mean(ratios: np.ndarray) -> float:
    return float(np.exp(np.nanmean(np.log(ratios))))
