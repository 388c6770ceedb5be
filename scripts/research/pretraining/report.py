"""Tables and figures of a pre-training: every module type's κ over training, and what of it is learned."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from condft.files.atomic import write_text
from scripts.research.pretraining.facts import (
    FACTS,
    Point,
    candidates,
    column,
    drift,
    expected_of,
    explained_by_layer,
    explained_with_interval,
    groups_of,
    order_kept,
    types_of,
)
from scripts.research.pretraining.figures import draw_kappa, draw_order
from scripts.research.statistics import explained_by_chance, explained_by_groups
from scripts.research.tables import table, with_interval

_KAPPA = "condition_number"


def write_report(points: Sequence[Point], results: Path) -> list[Path]:
    """Writes the tables and figures next to the JSONL and returns their paths.

    Raises:
        ValueError: Fewer than two points: there is no training to report.
    """
    if len(points) < 2:
        raise ValueError(f"{results} holds {len(points)} points: train first (python -m scripts.research.pretraining)")
    stem = results.with_suffix("")
    text = [*_heading(points), "", *_over_training(points), "", *_by_type(points), "", *_order(points)]
    text += ["", *_explained(points)]
    write_text(stem.with_suffix(".md"), "\n".join(text) + "\n")
    figures = [Path(f"{stem}_kappa.png"), Path(f"{stem}_order.png")]
    draw_kappa(points, figures[0])
    draw_order(points, figures[1])
    return [stem.with_suffix(".md"), *figures]


def _heading(points: Sequence[Point]) -> list[str]:
    last = points[-1]
    names = candidates(last["weights"])
    counts = [f"{label} {len(group)}" for label, group in groups_of(last).items() if group[0] in names]
    return [
        "# κ over pre-training: tables",
        "",
        f"Seed {last['seed']}, commit {(last['commit'] or 'unknown')[:12]}; {last['tokens']:,} tokens in "
        f"{last['step']:,} steps, {last['seconds_training'] / 60:.0f} minutes of training by the clock. "
        f"{len(names)} weights that a selection may choose ({', '.join(counts)}), and the routers (`gate`). "
        "Intervals: 95 %, bootstrap over weights within module types.",
    ]


def _over_training(points: Sequence[Point]) -> list[str]:
    groups = groups_of(points[0])
    rows = []
    for point in points:
        train = "" if point["train_loss"] is None else f"{point['train_loss']:.3f}"
        cells = [f"{np.median(column(point['weights'], names, 'condition_number')):.3g}" for names in groups.values()]
        rows.append([str(point["step"]), train, f"{point['held_out_loss']:.3f}", *cells])
    random = [f"{expected_of(points[0], names):.3g}" for names in groups.values()]
    rows.append(["a random matrix of that shape", "", "", *random])
    return ["## Median κ by module type", "", *table(["step", "train loss", "held-out loss", *groups], rows)]


def _by_type(points: Sequence[Point]) -> list[str]:
    first, last = points[0]["weights"], points[-1]["weights"]
    rows = []
    for label, names in groups_of(points[0]).items():
        mean, deviation = drift(first, last, names)
        cells = [
            f"{np.median(column(first, names, fact)):.3g} → {np.median(column(last, names, fact)):.3g}"
            for fact in FACTS
        ]
        kept = order_kept({name: first[name] for name in names}, {name: last[name] for name in names}, _KAPPA)
        shown = with_interval(*kept) if first[names[0]]["role"] != "router" else ""
        rows.append([label, str(len(names)), f"{mean:+.2f}, {deviation:.2f}", *cells, shown])
    head = ["module type", "weights", "change of log κ: mean, standard deviation", *FACTS.values()]
    title = "## From the initialization to the end, by module type (medians)"
    return [title, "", *table([*head, "within the type, order of κ kept"], rows)]


def _order(points: Sequence[Point]) -> list[str]:
    facts = [fact for fact in FACTS if fact != "frobenius_norm"]
    rows = []
    for before, point in pairwise(points):
        kept = [order_kept(points[0]["weights"], point["weights"], fact) for fact in facts]
        pairs = ((before, point), (point, points[-1]))
        kept += [order_kept(a["weights"], b["weights"], _KAPPA) for a, b in pairs]
        rows.append([str(point["step"]), *(with_interval(*found) for found in kept)])
    head = ["step", *(f"{FACTS[fact]}: with the initialization" for fact in facts)]
    head += ["κ: with the point before", "κ: with the end"]
    return ["## How much of the order within the types stays (Spearman)", "", *table(head, rows)]


def _explained(points: Sequence[Point]) -> list[str]:
    shown = {
        "condition_number": "log κ",
        "relative_condition_number": "relative κ",
        "entropy_deficit": "entropy deficit",
    }
    rows = []
    for point in points:
        weights = point["weights"]
        cells = [with_interval(*explained_with_interval(weights, fact, of_log=fact == _KAPPA)) for fact in shown]
        layer = f"{explained_by_layer(weights)[0]:.2f}"
        rows.append([str(point["step"]), *cells, f"{_spread_within(point):.3f}", layer])
    head = ["step", *shown.values(), "log κ: standard deviation within types"]
    return [
        "## Share of the variance over all weights that module type explains (η²)",
        "",
        f"As many groups of these sizes, drawn at random, explain {_by_chance(points[0]):.2f}; in the last column, "
        f"where the experts' types are taken out first, {explained_by_layer(points[0]['weights'])[1]:.2f}.",
        "",
        *table([*head, "log κ of experts within types: share that the layer explains"], rows),
    ]


def _by_chance(point: Point) -> float:
    return explained_by_chance(types_of(point["weights"], candidates(point["weights"])))


def _spread_within(point: Point) -> float:
    names = candidates(point["weights"])
    logs = np.log(column(point["weights"], names, _KAPPA))
    share = float(explained_by_groups(logs, types_of(point["weights"], names)))
    return float(logs.std() * (1 - share) ** 0.5)
