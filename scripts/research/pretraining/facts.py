"""How much of the spectral facts is learned and how much comes with the role: shares of variance, ranks, drifts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condft.plots.figures import short_labels
from condft.selection.random_matrix import expected_condition_number
from scripts.research.statistics import (
    Floats,
    bootstrap_draws,
    explained_by_groups,
    percentile_interval,
    rank_correlation,
)

FACTS = {
    "condition_number": "κ",
    "entropy_deficit": "entropy deficit per dimension",
    "log_volume": "log-volume per dimension",
    "stable_rank": "stable rank",
    "frobenius_norm": "Frobenius norm",
}
"""Key of a weight's facts -> label."""
Point = Mapping[str, Any]
"""A line of the results file: every weight's facts after a number of steps."""
Weights = Mapping[str, Mapping[str, Any]]
"""Name -> a weight's facts, as a point holds them."""

CANDIDATES = ("layer", "expert")
"""The roles that a selection may choose from: not routers, not embeddings."""


def candidates(weights: Weights) -> list[str]:
    """Names of the weights that a selection may choose, sorted."""
    return sorted(name for name, facts in weights.items() if facts["role"] in CANDIDATES)


def column(weights: Weights, names: Sequence[str], fact: str) -> Floats:
    """A fact of the named weights; `log_volume` and `entropy_deficit` per dimension, so that shapes compare."""
    values = np.array([weights[name][fact] for name in names], float)
    if fact in ("log_volume", "entropy_deficit"):
        values = values / np.array([min(weights[name]["shape"]) for name in names])
    return values


def types_of(weights: Weights, names: Sequence[str]) -> NDArray[np.str_]:
    """Module types of the named weights."""
    return np.array([weights[name]["module_type"] for name in names])


def explained_with_interval(weights: Weights, fact: str, *, of_log: bool) -> tuple[float, float, float]:
    """Share of a fact's variance that module types explain, and its 95 % bootstrap interval within the types."""
    names = candidates(weights)
    values, types = column(weights, names, fact), types_of(weights, names)
    values = np.log(values) if of_log else values
    draws = values[bootstrap_draws(types)]
    return float(explained_by_groups(values, types)), *percentile_interval(explained_by_groups(draws, types))


def explained_by_layer(weights: Weights) -> tuple[float, float]:
    """Of the variance of the experts' log κ within their module types, the share that the layer explains.

    Returns:
        The share, and what as many groups drawn at random within the types explain in the mean.
    """
    names = [name for name in candidates(weights) if weights[name]["role"] == "expert"]
    types = types_of(weights, names)
    layers = np.array([name.partition(".experts.")[0] for name in names])
    both = np.char.add(types, layers)
    logs = np.log(column(weights, names, "condition_number"))
    of_type = float(explained_by_groups(logs, types))
    share = (float(explained_by_groups(logs, both)) - of_type) / (1 - of_type)
    kinds, groups = len(np.unique(types)), len(np.unique(both))
    return share, (groups - kinds) / (len(names) - kinds)


def order_kept(before: Weights, after: Weights, fact: str) -> tuple[float, float, float]:
    """Spearman's correlation within types of a fact at two points, with its 95 % bootstrap interval."""
    names = candidates(before)
    types = types_of(before, names)
    x, y = column(before, names, fact), column(after, names, fact)
    index = bootstrap_draws(types)
    return float(rank_correlation(x, y, types)), *percentile_interval(rank_correlation(x[index], y[index], types))


def drift(before: Weights, after: Weights, names: Sequence[str]) -> tuple[float, float]:
    """How far log κ went: mean change, and the standard deviation of the changes, nats."""
    change = np.log(column(after, names, "condition_number") / column(before, names, "condition_number"))
    return float(change.mean()), float(change.std())


def groups_of(point: Point) -> dict[str, list[str]]:
    """Short label of a module type -> its weights, sorted; types of one weight (the embedding) are left out."""
    weights = point["weights"]
    by_type: dict[str, list[str]] = {}
    for name in sorted(weights):
        by_type.setdefault(weights[name]["module_type"], []).append(name)
    labels = short_labels(by_type)
    return {
        labels[kind].removeprefix("self_attn.").removeprefix("mlp."): names
        for kind, names in by_type.items()
        if len(names) > 1
    }


def expected_of(point: Point, names: Sequence[str]) -> float:
    """κ that a random matrix of these weights' shape has (its median)."""
    rows, columns = point["weights"][names[0]]["shape"]
    return expected_condition_number(rows, columns)
