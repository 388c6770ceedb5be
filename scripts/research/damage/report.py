"""Tables and figure of the single-tensor experiment, from the committed JSONL alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from condft.files.atomic import atomic_path, write_text
from scripts.research.damage.table import GRADIENT_SCORES, TARGETS, WEIGHT_SCORES, Table, load_table
from scripts.research.statistics import (
    Floats,
    bootstrap_draws,
    partial_rank_correlation,
    percentile_interval,
    rank_correlation,
    standardised_coefficients,
    thirds_ratio,
)

Indices = NDArray[np.int64]
"""`(..., n)` places of tensors; the draws of a bootstrap have each a tensor of the same type in the same place."""
Statistic = Callable[[Table, str, str, Indices], Floats]
_JOINT = ("κ", "entropy deficit per dimension", "stable rank", "Frobenius norm")
_SHOWN = ("κ", "entropy deficit per dimension", "gradient norm · ‖W‖", "Fisher along / slope²")


def write_report(results: Path) -> list[Path]:
    """Writes the tables (.md) and the figure (.png) beside the JSONL; returns their paths."""
    table = load_table(results)
    sections = [
        _heading(table),
        _section("Spearman correlation within types (ranks in each type, pooled)", table, _within),
        _section("The same after depth (depth and distance from the middle taken out of both ranks)", table, _partial),
        _section("Spearman correlation over all tensors, types not told apart", table, _overall),
        _near(table),
        _by_type(table),
        _regressions(table),
        _choices(table),
    ]
    paths = [results.with_suffix(".md"), results.with_suffix(".png")]
    write_text(paths[0], "\n\n".join(sections) + "\n")
    draw(table, paths[1])
    return paths


def _heading(table: Table) -> str:
    experiment, protocol = table.experiment, table.experiment["protocol"]
    no_gain = int(np.isnan(table.targets["kl_at_gain"]).sum())
    errors = [point["gain_error"] for line in table.lines for point in line["points"][:1]]
    commits = ", ".join(sorted({line["commit"][:12] for line in table.lines}))
    machines = ", ".join(sorted({_machine(line["machine"]) for line in table.lines}))
    minutes = sum(line["cpu_seconds"] for line in table.lines) / 60
    return f"""# Score against damage, tensor by tensor

Made by `python -m scripts.research.damage report`. {len(table.names)} tensors of {len(table.type_names)} types, seed
{protocol["seed"]}, commits {commits}; {minutes:.0f} minutes of a processor for the tensors ({machines}).

Base: {experiment["base_german_ce"]:.3f} nats a token of German, {experiment["base_english_ce"]:.3f} of English. Equal
norm: ‖ΔW‖/‖W‖ = {protocol["relative_norm"]:g}; equal gain: {protocol["equal_gain"]:g} nats a token of held-out German.
{len(table.near)} tensors have a point within a third of that gain; from the nearest point values are carried there by
the law of small updates (KL ~ gain², ΔCE ~ gain). {no_gain} gained nothing at either norm and have no value there.

| at equal norm | median | lowest and highest |
| --- | --- | --- |
| gain (nats a token; standard error of one: {np.median(errors):.4f}) | {_spread(table.targets["gain"])} |
| Δ English cross-entropy (nats a token) | {_spread(table.targets["ce"])} |
| KL on English (nats a token) | {_spread(table.targets["kl"])} |
| KL on English at equal gain | {_spread(table.targets["kl_at_gain"])} |

Medians. The last column is for as many tensors of a type as hold {max(table.sizes):,} weights, sharing the gain
between them: KL at equal gain times weights over {max(table.sizes):,}, as if gains and KL added up.

| type | tensors | weights each | gain at equal norm | KL at equal norm | KL at equal gain | equal weights |
| --- | --- | --- | --- | --- | --- | --- |
""" + "\n".join(_type_row(table, kind) for kind in table.type_names)


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['processor']}, {facts['cores']} cores"


def _spread(values: NDArray[np.float64]) -> str:
    return f"{np.nanmedian(values):.2g} | {np.nanmin(values):.2g} to {np.nanmax(values):.2g}"


def _type_row(table: Table, kind: str) -> str:
    inside = table.of_type(kind)
    size = table.sizes[inside[0]]
    medians = [float(np.nanmedian(table.targets[key][inside])) for key in ("gain", "kl", "kl_at_gain")]
    medians.append(medians[-1] * size / max(table.sizes))
    return f"| {kind} | {len(inside)} | {size:,} | {' | '.join(f'{value:.2g}' for value in medians)} |"


def _within(table: Table, score: str, target: str, index: Indices) -> Floats:
    return rank_correlation(table.scores[score][index], table.targets[target][index], _types(table, index))


def _partial(table: Table, score: str, target: str, index: Indices) -> Floats:
    depth = table.depth[index]
    covariates = np.stack([depth, np.abs(depth - 0.5)])
    return partial_rank_correlation(
        table.scores[score][index], table.targets[target][index], covariates, _types(table, index)
    )


def _overall(table: Table, score: str, target: str, index: Indices) -> Floats:
    return rank_correlation(table.scores[score][index], table.targets[target][index])


def _section(title: str, table: Table, statistic: Statistic) -> str:
    rows = [f"## {title}", "", f"| score | {' | '.join(TARGETS.values())} |", "| --- " * (1 + len(TARGETS)) + "|"]
    for score in (*WEIGHT_SCORES, *GRADIENT_SCORES):
        cells = [_with_interval(table, target, _bind(statistic, table, score, target)) for target in TARGETS]
        rows.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _near(table: Table) -> str:
    rows = [f"## Within types, the {len(table.near)} tensors alone that have a point near the equal gain", ""]
    rows += ["| score | Spearman with KL at equal gain | its lowest third over the type |", "| --- | --- | --- |"]
    for score in (*WEIGHT_SCORES, *GRADIENT_SCORES):
        statistics = (_bind(statistic, table, score, "kl_at_gain") for statistic in (_within, _lowest_third))
        cells = [_with_interval(table, "kl_at_gain", statistic, table.near) for statistic in statistics]
        rows.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _by_type(table: Table) -> str:
    rows = ["## Spearman correlation with KL at equal gain, type by type", ""]
    rows += [f"| score | {' | '.join(table.type_names)} |", "| --- " * (1 + len(table.type_names)) + "|"]
    for score in (*WEIGHT_SCORES, *GRADIENT_SCORES):
        cells = []
        for kind in table.type_names:
            inside = table.of_type(kind)
            cells.append(_with_interval(table, "kl_at_gain", _bind(_overall, table, score, "kl_at_gain"), inside))
        rows.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _regressions(table: Table) -> str:
    rows = [
        "## Regression of log KL at equal gain, with type, depth and depth² as covariates",
        "",
        "Standard deviations (within types) of log KL per standard deviation of the score. A type has one shape, so",
        "shape is in the type, and relative κ is κ but for a constant. Jointly: scores of the weight alone, together.",
        "",
        "| score | alone | jointly | jointly, beside Fisher along / slope² |",
        "| --- | --- | --- | --- |",
    ]
    best = "Fisher along / slope²"
    joint, beside = _coefficients(table, _JOINT), _coefficients(table, (*_JOINT, best))
    for score in (*WEIGHT_SCORES, *GRADIENT_SCORES):
        alone = _coefficients(table, (score,))[score]
        rows.append(f"| {score} | {alone} | {joint.get(score, '')} | {beside.get(score, '')} |")
    return "\n".join(rows)


def _coefficients(table: Table, scores: Sequence[str]) -> dict[str, str]:
    columns, target = np.stack([table.scores[score] for score in scores]), np.log(table.targets["kl_at_gain"])

    def coefficient(position: int) -> Callable[[Indices], Floats]:
        return lambda index: standardised_coefficients(
            columns[:, index], target[index], table.depth[index], _types(table, index)
        )[position]

    return {score: _with_interval(table, "kl_at_gain", coefficient(position)) for position, score in enumerate(scores)}


def _choices(table: Table) -> str:
    rows = [
        "## What choosing by a score would save",
        "",
        "Geometric mean of KL at equal gain of a type's lowest and highest third by the score, over that of the whole",
        "type; all types pooled. Below 1: less forgotten than by a random choice within the type.",
        "",
        "| score | lowest third | highest third |",
        "| --- | --- | --- |",
    ]
    for score in (*WEIGHT_SCORES, *GRADIENT_SCORES):
        cells = [
            _with_interval(table, "kl_at_gain", _bind(part, table, score, "kl_at_gain"))
            for part in (_lowest_third, _highest_third)
        ]
        rows.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _lowest_third(table: Table, score: str, target: str, index: Indices) -> Floats:
    return thirds_ratio(table.scores[score][index], table.targets[target][index], _types(table, index))


def _highest_third(table: Table, score: str, target: str, index: Indices) -> Floats:
    return thirds_ratio(-table.scores[score][index], table.targets[target][index], _types(table, index))


def _bind(statistic: Statistic, table: Table, score: str, target: str) -> Callable[[Indices], Floats]:
    return lambda index: statistic(table, score, target, index)


def _with_interval(
    table: Table, target: str, statistic: Callable[[Indices], Floats], among: Indices | None = None
) -> str:
    """`0.12 [0.01, 0.23]`: the statistic over the tensors that have the target, and its interval."""
    usable = np.flatnonzero(np.isfinite(table.targets[target]))
    usable = usable if among is None else np.intersect1d(usable, among)
    low, high = percentile_interval(statistic(usable[bootstrap_draws(_types(table, usable))]))
    return f"{float(statistic(usable)):.2f} [{low:.2f}, {high:.2f}]"


def _types(table: Table, index: Indices) -> Indices:
    """`(n,)`, the same for all draws."""
    return table.type_numbers[index.reshape(-1, index.shape[-1])[0]]


def draw(table: Table, path: Path) -> None:
    """Score against KL at equal gain, one panel a score, one color a type."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, score in zip(panels, _SHOWN, strict=True):
        logarithmic = score != "entropy deficit per dimension"
        for color, kind in enumerate(table.type_names):
            inside = table.of_type(kind)
            x, y = table.scores[score][inside], table.targets["kl_at_gain"][inside]
            axes.scatter(np.exp(x) if logarithmic else x, y, s=18, color=f"C{color}", alpha=0.75, label=kind)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_yscale("log")
        usable = np.flatnonzero(np.isfinite(table.targets["kl_at_gain"]))
        within, overall = (f(table, score, "kl_at_gain", usable) for f in (_within, _overall))
        axes.set_title(f"Spearman {within:+.2f} within types, {overall:+.2f} over all", fontsize=10)
        axes.set_xlabel(score + (" (nats)" if not logarithmic else ""))
        axes.grid(True, alpha=0.25)
    gain = table.experiment["protocol"]["equal_gain"]
    figure.supylabel(f"KL(base ‖ changed) on English at a gain of {gain:g} nats (nats a token)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle("Damage of single tensors at equal gain, against scores of the tensor", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
