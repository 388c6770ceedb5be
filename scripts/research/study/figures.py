"""A study's figures: fronts of forgetting against adaptation, ratios between arms, error rates over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from condft.files.atomic import atomic_path
from scripts.research.statistics import mean_interval
from scripts.research.study.levels import Ratio, value_at_level

Points = Sequence[Mapping[str, Any]]
Arms = Sequence[tuple[str, Sequence[Points]]]
"""Label -> the points of each seed's run."""


def draw_fronts(arms: Arms, path: Path, *, title: str) -> None:
    """Forgetting (two measures) over the test loss, which falls to the right.

    Args:
        arms: Each with one run a seed: markers are points of runs, the line their mean at equal test loss, the band
            its 95 % bootstrap interval where there are two seeds or more.
        path: Image file, written atomically.
        title: Above the figure.
    """
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = {"text_ce_change": "Δ text cross-entropy (nats/token)", "kl_to_base": "KL(base ‖ adapted) (nats/token)"}
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for index, (name, runs) in enumerate(arms):
            curves = [[(point["test_loss"], point[measure]) for point in run] for run in runs]
            _draw_front(axes, curves, _style(index, name))
        axes.set_xlabel("test loss (nats per answer token); adapted to the right")
        axes.set_ylabel(label)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # more would overlap
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_ylim(bottom=min(0.0, *(point[measure] for _, runs in arms for run in runs for point in run)))
        axes.invert_xaxis()
        axes.grid(True, which="major", alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_ratios(
    references: Mapping[str, Mapping[str, tuple[Sequence[float], Ratio]]], path: Path, *, title: str
) -> None:
    """What each reference forgets over what each control does, at equal test loss: below 1 the reference forgets less.

    Args:
        references: Name -> control -> each seed's ratio, and the ratio of the means, above 0, with its interval.
        path: Image file, written atomically.
        title: Above the figure.
    """
    controls = list(dict.fromkeys(name for found in references.values() for name in found))
    figure = Figure(figsize=(9.5, 1.6 + 0.2 * len(controls) * max(2, len(references))), layout="constrained")
    axes = figure.subplots()
    for index, (name, found) in enumerate(references.items()):
        offset = 0.7 * ((index + 0.5) / len(references) - 0.5)
        for control, (ratios, ratio) in found.items():
            row, color = controls.index(control) + offset, f"C{index}"
            shown = [value for value in ratios if value > 0]  # the axis is logarithmic
            axes.plot(shown, [row] * len(shown), "o", color=color, markersize=3, alpha=0.45)
            label = name if control == next(iter(found)) else None
            axes.plot(ratio.value, row, "D", color=color, markersize=5, label=label)
            if 0 < ratio.low <= ratio.high < np.inf:
                axes.plot([ratio.low, ratio.high], [row, row], color=color, linewidth=1.6)
    axes.axvline(1.0, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_yticks(range(len(controls)), controls, fontsize=8)
    axes.invert_yaxis()
    axes.grid(True, axis="x", which="both", alpha=0.2)
    axes.set_xlabel("forgetting over that of the arm at the left, equal test loss (dots: single seeds; bar: 95 %)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_across(
    levels: Sequence[float], panels: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, title: str
) -> None:
    """Forgetting of arms over that of others at each level: a jump in a line is a change of the best learning rate.

    Args:
        levels: Test losses.
        panels: Arm -> control -> (levels,) ratios; nan where there is none.
        path: Image file, written atomically.
        title: Above the figure.
    """
    controls = list(dict.fromkeys(name for ratios in panels.values() for name in ratios))
    figure = Figure(figsize=(2.5 + 4.2 * len(panels), 4.4), layout="constrained")
    for axes, (name, ratios) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for control, values in ratios.items():
            style = _style(controls.index(control), control)
            axes.plot(
                levels, values, style["line"] + style["marker"], color=style["color"], markersize=3, linewidth=1.2
            )
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        axes.set_title(f"{name} over", fontsize=10)
        axes.set_xlabel("test loss; adapted to the right")
        axes.invert_xaxis()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(True, which="both", alpha=0.2)
    figure.axes[0].set_ylabel("forgetting over the control's")
    styles = [_style(index, control) for index, control in enumerate(controls)]
    handles = [
        Line2D([], [], color=s["color"], linestyle=s["line"], marker=s["marker"], markersize=3, label=s["label"])
        for s in styles
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_curves(arms: Arms, path: Path, *, title: str) -> None:
    """Test loss over the steps, and the word error rate of each language if there is one."""
    languages = sorted({key for _, runs in arms for run in runs for point in run for key in point if "wer_" in key})
    shown = ["test_loss", *languages]
    figure = Figure(figsize=(2.5 + 4 * len(shown), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, measure in zip(panels, shown, strict=True):
        for index, (name, runs) in enumerate(arms):
            _draw_over_steps(axes, runs, measure, _style(index, name))
        axes.set_xlabel("step of stage 2")
        axes.set_ylabel("test loss (nats per answer token)" if measure == "test_loss" else "word error rate")
        axes.set_title("" if measure == "test_loss" else measure.removeprefix("wer_"), fontsize=10)
        if measure != "test_loss":  # the loss falls by a tenth only: on an axis from 0 the curves would be flat
            axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _style(index: int, name: str) -> dict[str, Any]:
    """There are ten colors; further arms differ by marker and dashes."""
    turn = index // 10
    return {"color": f"C{index % 10}", "marker": "os^vD"[turn % 5], "line": ("-", "--", ":")[turn % 3], "label": name}


def _draw_front(axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], style: dict[str, Any]) -> None:
    for curve in curves:
        points = {"color": style["color"], "markersize": 3, "alpha": 0.6}
        axes.plot([x for x, _ in curve], [y for _, y in curve], style["marker"], **points)
    # the losses that every seed's run goes through
    worst, best = min(curve[0][0] for curve in curves), max(min(x for x, _ in curve) for curve in curves)
    grid = np.geomspace(worst, best, 60) if best < worst else np.array([best])
    found = [[value_at_level(curve, float(level)) for curve in curves] for level in grid]
    _draw_mean(axes, grid, [[value for value in values if value is not None] for values in found], style)


def _draw_over_steps(axes: Axes, runs: Sequence[Points], measure: str, style: dict[str, Any]) -> None:
    values: dict[int, list[float]] = {}
    for point in (point for run in runs for point in run if measure in point):
        values.setdefault(point["step"], []).append(point[measure])
    if not values:
        return
    steps = sorted(values)
    axes.plot(steps, [np.mean(values[step]) for step in steps], style["marker"], color=style["color"], markersize=4)
    _draw_mean(axes, steps, [values[step] for step in steps], style)


def _draw_mean(axes: Axes, x: Any, values: Sequence[Sequence[float]], style: dict[str, Any]) -> None:
    color, intervals = style["color"], [mean_interval(found, draws=1000) for found in values]
    means = [mean for mean, _, _ in intervals]
    axes.plot(x, means, style["line"], color=color, linewidth=1.4, label=style["label"])
    if all(len(found) > 1 for found in values):
        lows, highs = ([interval[end] for interval in intervals] for end in (1, 2))
        axes.fill_between(x, lows, highs, color=color, alpha=0.15, linewidth=0)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
