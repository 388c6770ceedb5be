"""The pictures of a pre-training: κ of every module type over training, and what stays of its order."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.plots.figures import colors_of, save_figure
from scripts.research.pretraining.facts import (
    FACTS,
    Point,
    column,
    expected_of,
    explained_with_interval,
    groups_of,
    order_kept,
)

__all__ = ["draw_kappa", "draw_order"]

_KAPPA = "condition_number"


def draw_kappa(points: Sequence[Point], path: Path) -> None:
    """κ of every type (median, and the middle 80 %) over the steps and over the held-out loss."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    over_steps, over_loss = figure.subplots(1, 2, sharey=True)
    groups = groups_of(points[0])
    colors = colors_of(groups)
    steps, losses = [point["step"] for point in points], [point["held_out_loss"] for point in points]
    for label, names in groups.items():
        values = np.array([column(point["weights"], names, _KAPPA) for point in points])
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
        for axes, x in ((over_steps, steps), (over_loss, losses)):
            axes.plot(x, middle, "o-", color=colors[label], markersize=3, label=label)
            axes.fill_between(x, low, high, color=colors[label], alpha=0.12, linewidth=0)
            axes.axhline(expected_of(points[0], names), color=colors[label], linestyle=":", linewidth=0.8)
    _step_axis(over_steps, steps[-1])
    over_steps.set_ylabel("κ (dotted: a random matrix of that shape)")
    over_steps.set_yscale("log")
    over_loss.set_xlabel("held-out loss (nats a token); learned to the right")
    over_loss.invert_xaxis()
    over_loss.grid(True, alpha=0.25)
    handles, labels = over_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle("κ by module type while a small MoE is pre-trained: median and middle 80 %", fontsize=11)
    save_figure(figure, path)


def draw_order(points: Sequence[Point], path: Path) -> None:
    """What stays of the order within types, and what module type explains, over the steps; and the losses."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    loss, order, explained = figure.subplots(1, 3)
    steps = [point["step"] for point in points]
    loss.plot(steps, [point["held_out_loss"] for point in points], "o-", markersize=3, label="held out")
    trained = [point for point in points if point["train_loss"] is not None]
    loss.plot([p["step"] for p in trained], [p["train_loss"] for p in trained], "s--", markersize=3, label="train")
    loss.set_ylabel("loss (nats a token)")
    start = points[0]["weights"]
    for index, fact in enumerate(fact for fact in FACTS if fact != "frobenius_norm"):
        found = [order_kept(start, point["weights"], fact) for point in points[1:]]
        _draw_band(order, steps[1:], found, f"{FACTS[fact]}, with initialization", f"C{index}")
    before = [order_kept(a["weights"], b["weights"], _KAPPA) for a, b in pairwise(points)]
    order.plot(steps[1:], [value for value, _, _ in before], "k^--", markersize=3, label="κ, with the point before")
    order.axhline(0, color="gray", linewidth=0.6)
    order.set_ylabel("Spearman within module types")
    for index, (fact, label) in enumerate({_KAPPA: "log κ", "relative_condition_number": "relative κ"}.items()):
        shares = [explained_with_interval(point["weights"], fact, of_log=fact == _KAPPA) for point in points]
        _draw_band(explained, steps, shares, label, f"C{index}")
    explained.set_ylabel("share of variance that module type explains")
    explained.set_ylim(0, 1)
    for axes in (loss, order, explained):
        _step_axis(axes, steps[-1])
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle("What of κ is learned and what is the role's", fontsize=11)
    save_figure(figure, path)


def _draw_band(
    axes: Axes, x: Sequence[int], found: Sequence[tuple[float, float, float]], label: str, color: str
) -> None:
    axes.plot(x, [value for value, _, _ in found], "o-", color=color, markersize=3, label=label)
    axes.fill_between(
        x, [low for _, low, _ in found], [high for _, _, high in found], color=color, alpha=0.15, linewidth=0
    )


def _step_axis(axes: Axes, last: int) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.3, 1.3 * last)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(True, alpha=0.25)
