"""Atlas and stability as columns, from the JSONL: one table a model, one row a layer weight, sorted by name."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condft.report import Role
from condft.training import read_metrics
from scripts.research.statistics import Floats

Flags = NDArray[np.bool_]
Labels = NDArray[np.str_]
SCORES = ("κ", "entropy deficit", "stable rank")
"""In the order of stability.jsonl's figures."""


@dataclass(frozen=True)
class Atlas:
    """The layer weights of one model.

    Attributes:
        model: Its folder's name.
        lines: Of the JSONL, sorted by type and depth.
        others: Lines of its embeddings and other parts that are no layers.
    """

    model: str
    lines: list[dict[str, Any]]
    others: list[dict[str, Any]]

    def column(self, key: str) -> Floats:
        """`(num_weights,)`; what was infinite is so again."""
        return np.array([math.inf if line[key] is None else line[key] for line in self.lines], dtype=float)

    @cached_property
    def log_kappa(self) -> Floats:
        return np.log(self.column("condition_number"))

    @cached_property
    def types(self) -> Labels:
        return np.array([line["type"] for line in self.lines])

    @cached_property
    def shapes(self) -> Labels:
        """`192 x 576`, the shorter side first: a matrix and its transpose have the same spectrum."""
        return np.array([shape_of(line) for line in self.lines])

    @cached_property
    def square(self) -> Flags:
        return np.array([line["shape"][0] == line["shape"][1] for line in self.lines])

    @property
    def type_names(self) -> list[str]:
        return sorted(set(self.types.tolist()))

    @property
    def shape_names(self) -> list[str]:
        return sorted(set(self.shapes.tolist()), key=lambda shape: [int(side) for side in shape.split(" x ")])


@dataclass(frozen=True)
class Change:
    """One small change of all of a model's layer weights.

    Attributes:
        line: Of the JSONL.
        scores: Label of `SCORES` -> before and after, `(2, num_weights)`, sorted by name.
        moved: ‖ΔW‖/‖W‖ of each.
        types: Of each.
        square: Of each.
    """

    line: dict[str, Any]
    scores: dict[str, Floats]
    moved: Floats
    types: Labels
    square: Flags

    @property
    def label(self) -> str:
        """`bf16`, `noise 0.01`, `fine-tuning at 6e-05`."""
        name, amount = self.line["variant"], self.line["amount"]
        if name == "noise":
            return f"noise {amount:g}"
        return f"{name} at {amount:g}" if amount else str(name)


def load_atlases(path: Path) -> list[Atlas]:
    """One a model, in the file's order.

    Raises:
        ValueError: An empty file, or two versions of one model in it.
    """
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_metrics(path):
        by_model[line["model"]].append(line)
    if not by_model:
        raise ValueError(f"{path} has no weights: python -m scripts.research.kappa measure")
    for model, lines in by_model.items():
        if len({line["inputs"] for line in lines}) > 1:
            raise ValueError(f"{path} holds several versions of {model}: delete the lines of all but one")
    return [_atlas(model, lines) for model, lines in by_model.items()]


def load_changes(path: Path, atlas: Atlas) -> list[Change]:
    """The changes of a model, in the file's order; each against the same weights unchanged.

    Raises:
        ValueError: The file has changes of the model, but not its weights unchanged.
    """
    lines = [line for line in read_metrics(path) if line["inputs"] == atlas.lines[0]["inputs"]]
    base = [line["weights"] for line in lines if line["variant"] == "unchanged"]
    if lines and not base:
        raise ValueError(f"{path} lacks {atlas.model} unchanged: python -m scripts.research.kappa stability")
    ours = {line["name"]: line for line in atlas.lines}
    names = sorted(ours)
    found = []
    for line in lines:
        if line["variant"] == "unchanged":
            continue
        before, after = _figures(base[0], names), _figures(line["weights"], names)
        found.append(
            Change(
                line=line,
                scores={label: np.stack([before[:, place], after[:, place]]) for place, label in enumerate(SCORES)},
                moved=after[:, len(SCORES)],
                types=np.array([ours[name]["type"] for name in names]),
                square=np.array([ours[name]["shape"][0] == ours[name]["shape"][1] for name in names]),
            )
        )
    return found


def shape_of(line: dict[str, Any]) -> str:
    """`192 x 576`, the shorter side first."""
    return f"{min(line['shape'])} x {max(line['shape'])}"


def _atlas(model: str, lines: list[dict[str, Any]]) -> Atlas:
    ordered = sorted(lines, key=lambda line: (line["type"], line["depth"], line["name"]))
    layers = [line for line in ordered if line["role"] == Role.LAYER]
    return Atlas(model, layers, [line for line in ordered if line["role"] != Role.LAYER])


def _figures(weights: dict[str, list[float | None]], names: Sequence[str]) -> Floats:
    rows = ([math.inf if value is None else value for value in weights[name]] for name in names)
    return np.array(list(rows), dtype=float)
