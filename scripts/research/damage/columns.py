"""The experiment's JSONL as columns: one row a tensor: its scores, and what its training gains and damages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condft.training import read_metrics
from scripts.research.damage.equal_gain import at_equal_gain
from scripts.research.statistics import Floats
from scripts.research.store import lines_by_name

WEIGHT_SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "κ": lambda row: math.log(row["condition_number"]),
    "relative κ": lambda row: row["relative_condition_number"],
    "entropy deficit per dimension": lambda row: row["entropy_deficit"],
    "stable rank": lambda row: math.log(row["stable_rank"]),
    "Frobenius norm": lambda row: math.log(row["frobenius_norm"]),
}
"""Label -> score of a row, from the weight alone; as a logarithm where it is a ratio or a size."""

GRADIENT_SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
    "gradient norm · ‖W‖": lambda row: math.log(row["gradient_norm"] * row["frobenius_norm"]),
    "slope along the direction · ‖W‖": lambda row: math.log(row["slope"] * row["frobenius_norm"]),
    "Fisher trace · ‖W‖² / entries": lambda row: math.log(
        row["fisher_trace"] * row["frobenius_norm"] ** 2 / math.prod(row["shape"])
    ),
    "Fisher along the direction · ‖W‖²": lambda row: math.log(row["fisher_along"] * row["frobenius_norm"] ** 2),
    "Fisher trace / entries / gradient norm²": lambda row: math.log(
        row["fisher_trace"] / math.prod(row["shape"]) / row["gradient_norm"] ** 2
    ),
    "Fisher along / slope²": lambda row: math.log(row["fisher_along"] / row["slope"] ** 2),
}
"""The same, of scores that need a backward pass; the last two predict damage at equal gain, so ‖W‖ cancels."""

TARGETS = {
    "gain": "gain at equal norm",
    "kl": "KL at equal norm",
    "ce": "Δ English CE at equal norm",
    "kl_at_gain": "KL at equal gain",
    "ce_at_gain": "Δ English CE at equal gain",
}


@dataclass(frozen=True)
class Columns:
    """Columns over the measured tensors.

    Attributes:
        experiment: The line that describes the experiment.
        names: Of the tensors, sorted.
        types: `q_proj`, ...
        sizes: Weights in each.
        depth: 0 (first layer) to 1 (last).
        scores: Label -> `(num_tensors,)`.
        targets: Key of `TARGETS` -> `(num_tensors,)`; nan at equal gain where a tensor gained nothing, or where its KL
            is lost in fp32's rounding.
        lines: Of the tensors.
    """

    experiment: dict[str, Any]
    names: list[str]
    types: list[str]
    sizes: list[int]
    depth: Floats
    scores: dict[str, Floats]
    targets: dict[str, Floats]
    lines: list[dict[str, Any]]

    @property
    def type_names(self) -> list[str]:
        return sorted(set(self.types))

    @cached_property
    def near(self) -> NDArray[np.int64]:
        """Positions of the tensors with a point whose gain is within a third of the equal gain."""
        gain = self.experiment["protocol"]["equal_gain"]
        off = [min(abs(point["gain"] / gain - 1) for point in line["points"]) for line in self.lines]
        return np.flatnonzero(np.array(off) <= 1 / 3)

    @cached_property
    def type_numbers(self) -> NDArray[np.int64]:
        """Of each tensor, the index of its type in `type_names`."""
        return np.array([self.type_names.index(kind) for kind in self.types])

    def of_type(self, name: str) -> NDArray[np.int64]:
        """Positions of the tensors of a type."""
        return np.flatnonzero(self.type_numbers == self.type_names.index(name))


def load_columns(results: Path) -> Columns:
    """Reads the one experiment that a file holds.

    Raises:
        ValueError: None, or several.
    """
    lines = read_metrics(results)
    experiments = [line for line in lines if line["kind"] == "experiment"]
    if len(experiments) != 1:
        raise ValueError(f"{results} describes {len(experiments)} experiments; a report is of exactly one")
    scores, tensors = (lines_by_name(lines, kind, experiments[0]["experiment"]) for kind in ("scores", "tensor"))
    names = sorted(tensors)
    rows = [scores[name] for name in names]
    deepest = max(row["layer"] for row in scores.values())
    gain = experiments[0]["protocol"]["equal_gain"]
    return Columns(
        experiment=experiments[0],
        names=names,
        types=[row["type"] for row in rows],
        sizes=[math.prod(row["shape"]) for row in rows],
        depth=np.array([row["layer"] / max(1, deepest) for row in rows]),
        scores={
            label: np.array([score(row) for row in rows])
            for label, score in {**WEIGHT_SCORES, **GRADIENT_SCORES}.items()
        },
        targets=_targets([tensors[name]["points"] for name in names], gain),
        lines=[tensors[name] for name in names],
    )


def _targets(points: list[list[dict[str, Any]]], gain: float) -> dict[str, Floats]:
    first = [found[0] for found in points]

    def equal(measure: str, power: float) -> Floats:
        curves = ([(point["gain"], point[measure]) for point in found] for found in points)
        values = [at_equal_gain(curve, gain, power=power) for curve in curves]
        # a divergence is above 0; one that is not is lost in fp32's rounding
        usable = (value is not None and (power == 1 or value > 0) for value in values)
        return np.array([value if ok else math.nan for value, ok in zip(values, usable, strict=True)], dtype=float)

    return {
        "gain": np.array([point["gain"] for point in first]),
        "kl": np.array([point["damage_kl"] for point in first]),
        "ce": np.array([point["damage_ce"] for point in first]),
        "kl_at_gain": equal("damage_kl", 2),
        "ce_at_gain": equal("damage_ce", 1),
    }
