"""The pictures of the atlas and of the stability of κ."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from condft.plots.figures import save_figure
from scripts.research.information import entropy_deficit_bounds
from scripts.research.kappa.columns import Atlas, Change, Flags
from scripts.research.kappa.squares import square_ratio
from scripts.research.statistics import rank_correlation

_RANDOM, _BAND, _BOUND = "0.35", "0.9", "0.45"
_COLUMNS = 5
_FOOT = -0.4  # of the stability panels: room for labels under the lowest correlations


def draw_deficits(atlases: Sequence[Atlas], path: Path) -> None:
    """Entropy deficit over κ, a panel a model, a color a shape; both bounds, and a random matrix of each shape."""
    figure = Figure(figsize=(4.6 * len(atlases), 4.8), layout="constrained")
    panels = figure.subplots(1, len(atlases), sharey=True, squeeze=False)[0]
    for axes, atlas in zip(panels, atlases, strict=True):
        kappa, deficit = atlas.column("condition_number"), atlas.column("entropy_deficit")
        grid = np.geomspace(1.5, 3 * kappa[np.isfinite(kappa)].max(), 200)
        highest = [entropy_deficit_bounds(float(x), 2, per_dimension=True)[1] for x in grid]
        axes.plot(grid, highest, color=_BOUND, linewidth=1.2, label="at most (any n)")
        for style, n in zip(("--", ":", "-."), sorted({min(line["shape"]) for line in atlas.lines}), strict=False):
            lowest = [entropy_deficit_bounds(float(x), n, per_dimension=True)[0] for x in grid]
            axes.plot(grid, lowest, color=_BOUND, linestyle=style, linewidth=1.2, label=f"at least, n = {n}")
        for number, shape in enumerate(atlas.shape_names):
            inside = np.flatnonzero(atlas.shapes == shape)
            axes.plot(kappa[inside], deficit[inside], ".", color=f"C{number}", markersize=6, alpha=0.7, label=shape)
            random = atlas.lines[inside[0]]
            x, y = random["random_condition_number"], random["random_entropy_deficit"]
            axes.plot(x, y, "*", color=f"C{number}", markeredgecolor="black", markeredgewidth=0.8, markersize=13)
        axes.plot([], [], "*", color="white", markeredgecolor="black", markersize=11, label="random of that shape")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(atlas.model, fontsize=10)
        axes.set_xlabel("condition number κ")
        axes.grid(True, which="major", alpha=0.25)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    panels[0].set_ylabel("entropy deficit (nats a dimension)")
    figure.suptitle("Entropy deficit of layer weights between the two bounds that κ alone gives", fontsize=11)
    save_figure(figure, path)


def draw_depths(atlas: Atlas, path: Path) -> None:
    """κ over the layers, a small panel a type; dashed the median of random matrices of its shape.

    Grey on panels of square weights: where 95 % of random square matrices lie (Edelman 1988). A random rectangle's κ
    hardly leaves its line.
    """
    names = atlas.type_names
    columns = min(_COLUMNS if len(names) > 8 else 4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.4, 2.25 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_type(axes, atlas, name)
    for number, axes in enumerate(panels):
        if number >= len(names):
            axes.set_axis_off()
        elif number + columns >= len(names):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("layer", fontsize=8)
    figure.supylabel("condition number κ", fontsize=9)
    figure.suptitle(
        f"{atlas.model}: κ over depth by type. Dashed: median of random matrices of that shape;\n"
        "gray: 95 % of random squares",
        fontsize=10,
    )
    save_figure(figure, path)


def _draw_type(axes: Axes, atlas: Atlas, name: str) -> None:
    lines = [line for line in atlas.lines if line["type"] == name]
    kappa = [math.inf if line["condition_number"] is None else line["condition_number"] for line in lines]
    finite = [value for value in kappa if value < math.inf]
    for rows, columns, random in {(*line["shape"], line["random_condition_number"]) for line in lines}:
        axes.axhline(random, color=_RANDOM, linestyle="--", linewidth=1.0)
        if rows == columns:
            low, high = (rows * square_ratio(probability) for probability in (0.025, 0.975))
            axes.axhspan(low, high, color=_BAND, zorder=0)
            finite += [low, high]
        finite.append(random)
    axes.plot([line["depth"] for line in lines], kappa, ".-", linewidth=0.7, markersize=5)
    axes.set_yscale("log")
    # a decade at least, so that a type that hardly varies looks so
    middle, half = math.log10(max(finite) * min(finite)) / 2, max(0.5, math.log10(max(finite) / min(finite)) / 2 + 0.1)
    axes.set_ylim(10 ** (middle - half), 10 ** (middle + half))
    if half < 1.0:  # decades alone would leave one label or none
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=7)
    axes.set_title(f"{short_type(name)}  {lines[0]['shape'][0]} x {lines[0]['shape'][1]}", fontsize=8)
    axes.grid(True, which="major", alpha=0.25)


def draw_stability(changes: dict[str, list[Change]], path: Path) -> None:
    """Rank correlation within types with the unchanged weights, over the size of the change; a panel a model."""
    figure = Figure(figsize=(4.8 * len(changes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(changes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, (model, found) in zip(panels, changes.items(), strict=True):
        noise = sorted((c for c in found if c.line["variant"] == "noise"), key=lambda c: float(c.line["amount"]))
        others = [c for c in found if c.line["variant"] != "noise" and np.median(c.moved) > 0]
        for number, (label, score, where) in enumerate(SHOWN):
            for style, some in ((".-", noise), ("D", others)):
                x = [float(np.median(change.moved)) for change in some]
                y = [within_types(change, score, where) for change in some]
                shown = label if some is noise else None
                axes.plot(x, y, style, color=f"C{number}", mfc="white" if shown is None else None, ms=6, label=shown)
        for change in others:
            foot = (float(np.median(change.moved)), _FOOT)
            axes.axvline(foot[0], color="0.85", linewidth=0.8, zorder=0)
            axes.annotate(f" {change.label}", foot, rotation=90, fontsize=7, ha="right", va="bottom")
        axes.set_xscale("log")
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("median ‖ΔW‖ / ‖W‖")
        axes.grid(True, which="major", axis="y", alpha=0.25)
    panels[0].set_ylim(_FOOT, 1.05)
    panels[0].set_ylabel("Spearman within types, before and after")
    panels[0].legend(fontsize=8, frameon=False, loc="center left")
    figure.suptitle(
        "What small changes leave of the order within types. Lines: Gaussian noise; diamonds: as written", fontsize=11
    )
    save_figure(figure, path)


SHOWN = (
    ("κ, rectangular weights", "κ", False),
    ("κ, square weights", "κ", True),
    ("entropy deficit, all", "entropy deficit", None),
    ("stable rank, all", "stable rank", None),
)
"""Label, score, and which weights: square (True), the others (False), all (None)."""


def within_types(change: Change, score: str, square: bool | None) -> float:
    """Spearman's correlation of a score before and after, of ranks taken within types."""
    inside = _where(change, square)
    before, after = change.scores[score][:, inside]
    return float(rank_correlation(before, after, change.types[inside]))


def _where(change: Change, square: bool | None) -> Flags:
    return np.ones(len(change.types), dtype=bool) if square is None else change.square == square


def short_type(name: str) -> str:
    """`decoder self_attn.q_proj` of `model.decoder.layers.*.self_attn.q_proj`; other names as they are."""
    before, star, after = name.partition(".*.")
    tower = before.split(".")[-2] if star and before.count(".") > 1 else ""
    return f"{tower} {after or name}".strip()
