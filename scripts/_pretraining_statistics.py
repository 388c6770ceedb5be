"""How much of the spectral facts is learned and how much is the role's: shares of variance, ranks, drifts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _damage_statistics import Floats, bootstrap_draws, percentile_interval, rank_correlation
from numpy.typing import ArrayLike, NDArray

Weights = Mapping[str, Mapping[str, Any]]
"""Name -> a weight's facts, as a point holds them."""

CANDIDATES = ("layer", "expert")
"""The roles that a selection may choose from; routers and embeddings are told apart."""


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


def explained_share(values: ArrayLike, groups: ArrayLike) -> Floats:
    r"""$\eta^2$, the share of variance that lies between groups (Fisher 1925).

    Args:
        values: `(..., n)`.
        groups: `(n,)`, any labels.

    Returns:
        `(...)`, in [0, 1]. As many groups drawn at random have (groups - 1) / (n - 1) in the mean.
    """
    values, labels = np.asarray(values, float), np.asarray(groups)
    centred = values - values.mean(axis=-1, keepdims=True)
    between = np.zeros(values.shape[:-1])
    for label in np.unique(labels):
        inside = centred[..., labels == label]
        between += inside.shape[-1] * inside.mean(axis=-1) ** 2
    return between / (centred**2).sum(axis=-1)


def explained_with_interval(weights: Weights, fact: str, *, of_log: bool) -> tuple[float, float, float]:
    """Share of a fact's variance that module types explain, and its 95 % bootstrap interval within the types."""
    names = candidates(weights)
    values, types = column(weights, names, fact), types_of(weights, names)
    values = np.log(values) if of_log else values
    draws = values[bootstrap_draws(types)]
    return float(explained_share(values, types)), *percentile_interval(explained_share(draws, types))


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
    of_type = float(explained_share(logs, types))
    share = (float(explained_share(logs, both)) - of_type) / (1 - of_type)
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
