"""Pictures of reports and runs: κ by depth and module type with the selection marked, and training curves."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)  # figures are written to files; no display is needed

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from condft.files import atomic_path
from condft.report import SpectralReport, SpectralRow

__all__ = ["plot_condition_numbers", "plot_training"]

_RANK_DEFICIENT = "x"


def plot_condition_numbers(report: SpectralReport, path: str | Path, *, selected: Collection[str] = ()) -> None:
    """κ of every unit by depth: one panel a part of the model, one colour a module type, the selection ringed.

    Units of infinite κ stand as crosses on the panel's upper edge.

    Args:
        report: What `analyze` returned.
        path: Image file; its suffix (.png, .svg, .pdf) is the format. Written atomically.
        selected: Names of units to mark.
    """
    parts = _parts(report)
    figure = Figure(figsize=(9.5, 0.6 + 3.9 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axes, (part, rows) in zip(panels, parts.items(), strict=True):
        _draw_part(axes, rows, set(selected))
        axes.set_title(part or "model", loc="left", fontsize=10)
    figure.suptitle(
        "Condition number by depth: low κ may train (ringed: selected), high κ stays frozen"
        if selected
        else "Condition number by depth",
        fontsize=11,
    )
    _save(figure, path)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Training") -> None:
    """Loss, learning rates and gradient norm over all optimizer steps, stage boundaries drawn.

    Args:
        metrics: Lines of `metrics.jsonl`: `stage`, `loss`, `grad_norm` and `learning_rate` (component -> rate).
        path: Image file, written atomically.
        title: Above the figure.
    """
    figure = Figure(figsize=(9.5, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = range(1, len(metrics) + 1)
    losses = [line["loss"] for line in metrics]
    top.plot(steps, losses, color="0.75", linewidth=0.8, label="loss of a step")
    top.plot(steps, _smoothed(losses), color="C0", label="running mean")
    top.set_ylabel("cross-entropy of answer tokens (nats)")
    top.set_ylim(bottom=0)
    top.legend(frameon=False)
    for component in sorted({name for line in metrics for name in line["learning_rate"]}):
        bottom.plot(steps, [line["learning_rate"].get(component, 0.0) for line in metrics], label=f"lr {component}")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    norms = bottom.twinx()
    norms.plot(steps, [line["grad_norm"] for line in metrics], color="0.6", linewidth=0.8, label="gradient norm")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    handles = bottom.get_lines() + norms.get_lines()
    bottom.legend(handles, [str(line.get_label()) for line in handles], frameon=False, fontsize=8)
    for position in (i + 0.5 for i in range(1, len(metrics)) if metrics[i]["stage"] != metrics[i - 1]["stage"]):
        for axes in (top, bottom):
            axes.axvline(position, color="0.5", linestyle=":")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _parts(report: SpectralReport) -> dict[str, list[SpectralRow]]:
    """Rows of units that lie in numbered layers, by what stands before the first number (tower, language model)."""
    parts: dict[str, list[SpectralRow]] = defaultdict(list)
    for row in report.rows:
        match = re.search(r"(?:^|\.)\d+(?=\.|\[|$)", row.name)
        if match:
            parts[row.name[: match.start()]].append(row)
    return dict(sorted(parts.items())) or {"": list(report.rows)}


def _depth(name: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?=\.|\[|$)", name)
    return int(found.group(1)) if found else 0


def _draw_part(axes: Axes, rows: Sequence[SpectralRow], selected: set[str]) -> None:
    by_type: dict[str, list[SpectralRow]] = defaultdict(list)
    for row in rows:
        by_type[row.module_type].append(row)
    finite = [row.condition_number for row in rows if row.condition_number != float("inf")]
    ceiling = 3.0 * max(finite, default=10.0)
    for index, (module_type, members) in enumerate(sorted(by_type.items())):
        members = sorted(members, key=lambda row: (_depth(row.name), row.name))
        x = [_depth(row.name) for row in members]
        y = [min(row.condition_number, ceiling) for row in members]
        label = module_type.rpartition("*.")[2] or module_type
        colour = f"C{index % 10}"
        axes.plot(x, y, ".-", color=colour, linewidth=0.6, markersize=4, label=label)
        deficient = [i for i, row in enumerate(members) if row.condition_number == float("inf")]
        axes.plot([x[i] for i in deficient], [y[i] for i in deficient], _RANK_DEFICIENT, color=colour)
        ringed = [i for i, row in enumerate(members) if row.name in selected]
        axes.plot([x[i] for i in ringed], [y[i] for i in ringed], "o", mfc="none", mec=colour, ms=9, mew=1.6)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("condition number κ")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _smoothed(values: Sequence[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
