"""Tables and figures of a pre-training: every module type's κ over training, and what of it is learned."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.files.atomic import write_text
from condft.plots.figures import colors_of, save_figure, short_labels
from condft.selection.random_matrix import expected_condition_number
from scripts.research.kappa.statistics import explained_by_groups
from scripts.research.pretraining.statistics import (
    candidates,
    column,
    drift,
    explained_by_layer,
    explained_with_interval,
    order_kept,
    types_of,
)

Point = Mapping[str, Any]

_KAPPA = "condition_number"
FACTS = {
    "condition_number": "κ",
    "entropy_deficit": "entropy deficit per dimension",
    "log_volume": "log-volume per dimension",
    "stable_rank": "stable rank",
    "frobenius_norm": "Frobenius norm",
}


def write_report(points: Sequence[Point], results: Path) -> list[Path]:
    """Writes the tables and figures beside the JSONL and returns their paths.

    Raises:
        ValueError: Fewer than two points: there is no training to tell of.
    """
    if len(points) < 2:
        raise ValueError(f"{results} holds {len(points)} points: train first (python -m scripts.research.pretraining)")
    stem = results.with_suffix("")
    text = [*_heading(points), "", *_over_training(points), "", *_by_type(points), "", *_order(points)]
    text += ["", *_explained(points)]
    write_text(stem.with_suffix(".md"), "\n".join(text) + "\n")
    figures = [Path(f"{stem}_kappa.png"), Path(f"{stem}_order.png")]
    _draw_kappa(points, figures[0])
    _draw_order(points, figures[1])
    return [stem.with_suffix(".md"), *figures]


def _heading(points: Sequence[Point]) -> list[str]:
    last = points[-1]
    names = candidates(last["weights"])
    counts = [f"{label} {len(group)}" for label, group in _groups(last).items() if group[0] in names]
    return [
        "# κ over pre-training: tables",
        "",
        f"Seed {last['seed']}, commit {(last['commit'] or 'unknown')[:12]}; {last['tokens']:,} tokens in "
        f"{last['step']:,} steps, {last['seconds_training'] / 60:.0f} minutes of training by the clock. "
        f"{len(names)} weights that a selection may choose ({', '.join(counts)}), the routers (`gate`) beside them. "
        "Intervals: 95 %, bootstrap over weights within module types.",
    ]


def _over_training(points: Sequence[Point]) -> list[str]:
    groups = _groups(points[0])
    lines = [
        "## Median κ by module type",
        "",
        "| step | train loss | held-out loss | " + " | ".join(groups) + " |",
        "| --- " * (3 + len(groups)) + "|",
    ]
    for point in points:
        train = "" if point["train_loss"] is None else f"{point['train_loss']:.3f}"
        cells = [f"{np.median(column(point['weights'], names, 'condition_number')):.3g}" for names in groups.values()]
        lines.append(f"| {point['step']} | {train} | {point['held_out_loss']:.3f} | {' | '.join(cells)} |")
    expected = [_expected(points[0], names) for names in groups.values()]
    return [*lines, "| a random matrix of that shape | | | " + " | ".join(f"{value:.3g}" for value in expected) + " |"]


def _by_type(points: Sequence[Point]) -> list[str]:
    first, last = points[0]["weights"], points[-1]["weights"]
    lines = [
        "## From the initialization to the end, by module type (medians)",
        "",
        "| module type | weights | change of log κ: mean, standard deviation | "
        + " | ".join(FACTS.values())
        + " | within the type, order of κ kept |",
        "| --- " * (4 + len(FACTS)) + "|",
    ]
    for label, names in _groups(points[0]).items():
        mean, deviation = drift(first, last, names)
        cells = [
            f"{np.median(column(first, names, fact)):.3g} → {np.median(column(last, names, fact)):.3g}"
            for fact in FACTS
        ]
        kept = order_kept({name: first[name] for name in names}, {name: last[name] for name in names}, _KAPPA)
        shown = f"{kept[0]:.2f} [{kept[1]:.2f}, {kept[2]:.2f}]" if first[names[0]]["role"] != "router" else ""
        lines.append(f"| {label} | {len(names)} | {mean:+.2f}, {deviation:.2f} | {' | '.join(cells)} | {shown} |")
    return lines


def _order(points: Sequence[Point]) -> list[str]:
    facts = [fact for fact in FACTS if fact != "frobenius_norm"]
    lines = [
        "## How much of the order within the types stays (Spearman)",
        "",
        "| step | " + " | ".join(f"{FACTS[fact]}: with the initialization" for fact in facts) + " | κ: with the point "
        "before | κ: with the end |",
        "| --- " * (3 + len(facts)) + "|",
    ]
    for before, point in pairwise(points):
        cells = [_interval(order_kept(points[0]["weights"], point["weights"], fact)) for fact in facts]
        cells += [
            _interval(order_kept(a["weights"], b["weights"], _KAPPA))
            for a, b in ((before, point), (point, points[-1]))
        ]
        lines.append(f"| {point['step']} | {' | '.join(cells)} |")
    return lines


def _explained(points: Sequence[Point]) -> list[str]:
    shown = {
        "condition_number": "log κ",
        "relative_condition_number": "relative κ",
        "entropy_deficit": "entropy deficit",
    }
    lines = [
        "## Share of the variance over all weights that module type explains (η²)",
        "",
        f"As many groups of these sizes, drawn at random, explain {_by_chance(points[0]):.2f}; in the last column, "
        f"where the experts' types are taken out first, {explained_by_layer(points[0]['weights'])[1]:.2f}.",
        "",
        "| step | "
        + " | ".join(shown.values())
        + " | log κ: standard deviation within types | log κ of experts within types: share "
        "that the layer explains |",
        "| --- " * (3 + len(shown)) + "|",
    ]
    for point in points:
        weights = point["weights"]
        cells = [_interval(explained_with_interval(weights, fact, of_log=fact == _KAPPA)) for fact in shown]
        lines.append(
            f"| {point['step']} | {' | '.join(cells)} | {_spread_within(point):.3f} | "
            f"{explained_by_layer(weights)[0]:.2f} |"
        )
    return lines


def _groups(point: Point) -> dict[str, list[str]]:
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


def _expected(point: Point, names: Sequence[str]) -> float:
    rows, columns = point["weights"][names[0]]["shape"]
    return expected_condition_number(rows, columns)


def _by_chance(point: Point) -> float:
    names = candidates(point["weights"])
    return (len(set(types_of(point["weights"], names))) - 1) / (len(names) - 1)


def _spread_within(point: Point) -> float:
    names = candidates(point["weights"])
    logs = np.log(column(point["weights"], names, _KAPPA))
    share = float(explained_by_groups(logs, types_of(point["weights"], names)))
    return float(logs.std() * (1 - share) ** 0.5)


def _interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def _draw_kappa(points: Sequence[Point], path: Path) -> None:
    """κ of every type (median, and the middle 80 %) over the steps and over the held-out loss."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    over_steps, over_loss = figure.subplots(1, 2, sharey=True)
    groups = _groups(points[0])
    colors = colors_of(groups)
    steps, losses = [point["step"] for point in points], [point["held_out_loss"] for point in points]
    for label, names in groups.items():
        values = np.array([column(point["weights"], names, _KAPPA) for point in points])
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
        for axes, x in ((over_steps, steps), (over_loss, losses)):
            axes.plot(x, middle, "o-", color=colors[label], markersize=3, label=label)
            axes.fill_between(x, low, high, color=colors[label], alpha=0.12, linewidth=0)
            axes.axhline(_expected(points[0], names), color=colors[label], linestyle=":", linewidth=0.8)
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


def _draw_order(points: Sequence[Point], path: Path) -> None:
    """What stays of the order within types, and what module type explains, over the steps; the loss beside them."""
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
