"""Tables and figure of the single-tensor experiment, from the committed JSONL alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from condft.files.atomic import atomic_path, write_text
from scripts.research.damage.columns import GRADIENT_SCORES, TARGETS, WEIGHT_SCORES, Columns, load_columns
from scripts.research.damage.equal_gain import standardized_coefficients, thirds_ratio
from scripts.research.statistics import (
    Floats,
    bootstrap_draws,
    partial_rank_correlation,
    percentile_interval,
    rank_correlation,
)
from scripts.research.tables import table, with_interval

Indices = NDArray[np.int64]
"""`(..., n)` positions of tensors; every draw of a bootstrap has a tensor of the same type at each position."""
Statistic = Callable[[Columns, str, str, Indices], Floats]
_JOINT = ("κ", "entropy deficit per dimension", "stable rank", "Frobenius norm")
SCORES = (*WEIGHT_SCORES, *GRADIENT_SCORES)
_SHOWN = ("κ", "entropy deficit per dimension", "gradient norm · ‖W‖", "Fisher along / slope²")


def write_report(results: Path) -> list[Path]:
    """Writes the tables (.md) and the figure (.png) next to the JSONL; returns their paths."""
    columns = load_columns(results)
    sections = [
        _heading(columns),
        _section("Spearman correlation within types (ranks in each type, pooled)", columns, _within),
        _section("The same, depth and distance from the middle taken out of both ranks", columns, _partial),
        _section("Spearman correlation over all tensors, without regard to type", columns, _overall),
        _near(columns),
        _by_type(columns),
        _regressions(columns),
        _choices(columns),
    ]
    paths = [results.with_suffix(".md"), results.with_suffix(".png")]
    write_text(paths[0], "\n\n".join(sections) + "\n")
    draw(columns, paths[1])
    return paths


def _heading(columns: Columns) -> str:
    experiment, protocol = columns.experiment, columns.experiment["protocol"]
    commits = ", ".join(sorted({line["commit"][:12] for line in columns.lines}))
    machines = ", ".join(sorted({_machine(line["machine"]) for line in columns.lines}))
    tensors = f"{len(columns.names)} tensors of {len(columns.type_names)} types"
    minutes = sum(line["cpu_seconds"] for line in columns.lines) / 60
    no_gain = int(np.isnan(columns.targets["kl_at_gain"]).sum())
    largest = f"{max(columns.sizes):,}"
    return f"""# Score against damage, tensor by tensor

Made by `python -m scripts.research.damage report`. {tensors}, seed
{protocol["seed"]}, commits {commits}; {minutes:.0f} minutes of a processor for the tensors ({machines}).

Base: {experiment["base_german_ce"]:.3f} nats a token of German, {experiment["base_english_ce"]:.3f} of English. Equal
norm: ‖ΔW‖/‖W‖ = {protocol["relative_norm"]:g}; equal gain: {protocol["equal_gain"]:g} nats a token of held-out German.
{len(columns.near)} tensors have a point within a third of that gain; from the nearest point values are carried there
by the law of small updates (KL ~ gain², ΔCE ~ gain). {no_gain} gained nothing at either norm and have no value there.

{_targets_table(columns)}

Medians. The last column is for as many tensors of a type as hold {largest} weights, sharing the gain
between them: KL at equal gain times weights over {largest}, as if gains and KL added up.

{_types_table(columns)}"""


def _targets_table(columns: Columns) -> str:
    errors = [point["gain_error"] for line in columns.lines for point in line["points"][:1]]
    labels = {
        f"gain (nats a token; standard error of one: {np.median(errors):.4f})": "gain",
        "Δ English cross-entropy (nats a token)": "ce",
        "KL on English (nats a token)": "kl",
        "KL on English at equal gain": "kl_at_gain",
    }
    rows = [[label, *_median_and_range(columns.targets[key])] for label, key in labels.items()]
    return "\n".join(table(["at equal norm", "median", "lowest and highest"], rows))


def _types_table(columns: Columns) -> str:
    head = ["type", "tensors", "weights each", "gain at equal norm", "KL at equal norm", "KL at equal gain"]
    return "\n".join(table([*head, "equal weights"], [_type_row(columns, kind) for kind in columns.type_names]))


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['processor']}, {facts['cores']} cores"


def _median_and_range(values: Floats) -> tuple[str, str]:
    return f"{np.nanmedian(values):.2g}", f"{np.nanmin(values):.2g} to {np.nanmax(values):.2g}"


def _type_row(columns: Columns, kind: str) -> list[str]:
    inside = columns.of_type(kind)
    size = columns.sizes[inside[0]]
    medians = [float(np.nanmedian(columns.targets[key][inside])) for key in ("gain", "kl", "kl_at_gain")]
    medians.append(medians[-1] * size / max(columns.sizes))
    return [kind, str(len(inside)), f"{size:,}", *(f"{value:.2g}" for value in medians)]


def _titled(title: str, text: list[str], lines: list[str]) -> str:
    """A section: title, paragraph (may be empty), columns."""
    return "\n".join([f"## {title}", "", *([*text, ""] if text else []), *lines])


def _within(columns: Columns, score: str, target: str, index: Indices) -> Floats:
    return rank_correlation(columns.scores[score][index], columns.targets[target][index], _types(columns, index))


def _partial(columns: Columns, score: str, target: str, index: Indices) -> Floats:
    depth = columns.depth[index]
    covariates = np.stack([depth, np.abs(depth - 0.5)])
    return partial_rank_correlation(
        columns.scores[score][index], columns.targets[target][index], covariates, _types(columns, index)
    )


def _overall(columns: Columns, score: str, target: str, index: Indices) -> Floats:
    return rank_correlation(columns.scores[score][index], columns.targets[target][index])


def _section(title: str, columns: Columns, statistic: Statistic) -> str:
    rows = [
        [score, *(_with_interval(columns, target, _bind(statistic, columns, score, target)) for target in TARGETS)]
        for score in SCORES
    ]
    return _titled(title, [], table(["score", *TARGETS.values()], rows))


def _near(columns: Columns) -> str:
    rows = []
    for score in SCORES:
        statistics = (_bind(statistic, columns, score, "kl_at_gain") for statistic in (_within, _lowest_third))
        rows.append([score, *(_with_interval(columns, "kl_at_gain", found, columns.near) for found in statistics)])
    title = f"Within types, the {len(columns.near)} tensors alone that have a point near the equal gain"
    head = ["score", "Spearman with KL at equal gain", "its lowest third over the type"]
    return _titled(title, [], table(head, rows))


def _by_type(columns: Columns) -> str:
    def cell(score: str, kind: str) -> str:
        statistic = _bind(_overall, columns, score, "kl_at_gain")
        return _with_interval(columns, "kl_at_gain", statistic, columns.of_type(kind))

    rows = [[score, *(cell(score, kind) for kind in columns.type_names)] for score in SCORES]
    title = "Spearman correlation with KL at equal gain, type by type"
    return _titled(title, [], table(["score", *columns.type_names], rows))


def _regressions(columns: Columns) -> str:
    best = "Fisher along / slope²"
    joint, with_best = _coefficients(columns, _JOINT), _coefficients(columns, (*_JOINT, best))
    rows = [
        [score, _coefficients(columns, (score,))[score], joint.get(score, ""), with_best.get(score, "")]
        for score in SCORES
    ]
    return _titled(
        "Regression of log KL at equal gain, with type, depth and depth² as covariates",
        [
            "Standard deviations (within types) of log KL per standard deviation of the score. A type has one shape,",
            "so shape is in the type, and relative κ is κ but for a constant. Jointly: scores of the weight alone,",
            "together.",
        ],
        table(["score", "alone", "jointly", "jointly, with Fisher along / slope²"], rows),
    )


def _coefficients(columns: Columns, scores: Sequence[str]) -> dict[str, str]:
    values, target = np.stack([columns.scores[score] for score in scores]), np.log(columns.targets["kl_at_gain"])

    def coefficient(position: int) -> Callable[[Indices], Floats]:
        return lambda index: standardized_coefficients(
            values[:, index], target[index], columns.depth[index], _types(columns, index)
        )[position]

    return {score: _with_interval(columns, "kl_at_gain", coefficient(index)) for index, score in enumerate(scores)}


def _choices(columns: Columns) -> str:
    def cell(score: str, part: Statistic) -> str:
        return _with_interval(columns, "kl_at_gain", _bind(part, columns, score, "kl_at_gain"))

    return _titled(
        "What choosing by a score would save",
        [
            "Geometric mean of KL at equal gain of a type's lowest and highest third by the score, over that of the",
            "whole type; all types pooled. Below 1: less forgotten than by a random choice within the type.",
        ],
        table(
            ["score", "lowest third", "highest third"],
            [[score, cell(score, _lowest_third), cell(score, _highest_third)] for score in SCORES],
        ),
    )


def _lowest_third(columns: Columns, score: str, target: str, index: Indices) -> Floats:
    return thirds_ratio(columns.scores[score][index], columns.targets[target][index], _types(columns, index))


def _highest_third(columns: Columns, score: str, target: str, index: Indices) -> Floats:
    return thirds_ratio(-columns.scores[score][index], columns.targets[target][index], _types(columns, index))


def _bind(statistic: Statistic, columns: Columns, score: str, target: str) -> Callable[[Indices], Floats]:
    return lambda index: statistic(columns, score, target, index)


def _with_interval(
    columns: Columns, target: str, statistic: Callable[[Indices], Floats], among: Indices | None = None
) -> str:
    """`0.12 [0.01, 0.23]`: the statistic over the tensors that have the target, and its interval."""
    usable = np.flatnonzero(np.isfinite(columns.targets[target]))
    usable = usable if among is None else np.intersect1d(usable, among)
    low, high = percentile_interval(statistic(usable[bootstrap_draws(_types(columns, usable))]))
    return with_interval(float(statistic(usable)), low, high)


def _types(columns: Columns, index: Indices) -> Indices:
    """`(n,)`, the same for all draws."""
    return columns.type_numbers[index.reshape(-1, index.shape[-1])[0]]


def draw(columns: Columns, path: Path) -> None:
    """Score against KL at equal gain, one panel a score, one color a type."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, score in zip(panels, _SHOWN, strict=True):
        logarithmic = score != "entropy deficit per dimension"
        for color, kind in enumerate(columns.type_names):
            inside = columns.of_type(kind)
            x, y = columns.scores[score][inside], columns.targets["kl_at_gain"][inside]
            axes.scatter(np.exp(x) if logarithmic else x, y, s=18, color=f"C{color}", alpha=0.75, label=kind)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_yscale("log")
        usable = np.flatnonzero(np.isfinite(columns.targets["kl_at_gain"]))
        within, overall = (f(columns, score, "kl_at_gain", usable) for f in (_within, _overall))
        axes.set_title(f"Spearman {within:+.2f} within types, {overall:+.2f} over all", fontsize=10)
        axes.set_xlabel(score + (" (nats)" if not logarithmic else ""))
        axes.grid(True, alpha=0.25)
    gain = columns.experiment["protocol"]["equal_gain"]
    figure.supylabel(f"KL(base ‖ changed) on English at a gain of {gain:g} nats (nats a token)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle("Damage of single tensors at equal gain, against scores of the tensor", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
