"""κ of every unit by depth and module type, compared with a random matrix of the same shape."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from condft.plots.figures import colors_of, dashes, save_figure, short_labels
from condft.report import SpectralReport, SpectralRow
from condft.selection.random_matrix import expected_condition_number

__all__ = ["plot_condition_numbers"]

_RANK_DEFICIENT = "x"
# A whole part of the name that is a number, also before the `[` of a unit within a parameter.
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|\[|$)")


def plot_condition_numbers(report: SpectralReport, path: str | Path, *, selected: Collection[str] = ()) -> None:
    """Draws κ of every unit by depth. Each part of the model has a panel, each module type a color.

    Selected units are ringed. Units of infinite κ are crosses at the upper edge of a panel. A dashed line in a type's
    color is the median condition number of a random matrix of its shape. Types of the same shape share one line, with
    alternating dashes.

    Args:
        report: From `analyze`.
        path: Image file; its suffix (.png, .svg, .pdf) is the format. Written atomically.
        selected: Names of units to mark.

    Raises:
        ValueError: A selected name that the report does not have, or a suffix that is no picture format.

    Example:
        >>> plot_condition_numbers(report, "condition_numbers.png")

        With the units that a budget selects:

        >>> from condft import select_units
        >>> selected = select_units(report, trainable_fraction=0.2).names
        >>> plot_condition_numbers(report, "selected.svg", selected=selected)
    """
    missing = sorted(set(selected).difference(row.name for row in report.rows))
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(set(selected))} selected units have no row in the report, the first is "
            f"{missing[0]!r}: plot the report that they were selected from"
        )
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
    save_figure(figure, path)


def _parts(report: SpectralReport) -> dict[str, list[SpectralRow]]:
    """Rows of units in numbered layers, by the name before the first number (tower, language model).

    A report without numbered layers is one part.
    """
    parts: dict[str, list[SpectralRow]] = defaultdict(list)
    for row in report.rows:
        match = _LAYER_INDEX.search(row.name)
        if match:
            parts[row.name[: match.start()]].append(row)
    return dict(sorted(parts.items())) or {"": list(report.rows)}


def _depth(name: str) -> int:
    found = _LAYER_INDEX.search(name)
    return int(found.group(1)) if found else 0


def _draw_part(axes: Axes, rows: Sequence[SpectralRow], selected: set[str]) -> None:
    by_type: dict[str, list[SpectralRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (_depth(row.name), row.name)):
        by_type[row.module_type].append(row)
    colors, labels = colors_of(by_type), short_labels(by_type)
    finite = [row.condition_number for row in rows if row.condition_number < math.inf]
    # An infinite value has no place on a logarithmic axis. Three times the largest finite one is clearly above it.
    ceiling = 3.0 * max(finite, default=10.0)
    for module_type, members in sorted(by_type.items()):
        color = colors[module_type]
        x = [_depth(row.name) for row in members]
        y = [min(row.condition_number, ceiling) for row in members]
        # Several units a layer (heads, experts): a line through them would join units, not layers.
        alone = len(set(x)) == len(x)
        style = ".-" if alone else "."
        axes.plot(x, y, style, color=color, linewidth=0.6, markersize=4, label=labels[module_type])
        deficient = [i for i, row in enumerate(members) if row.condition_number == math.inf]
        axes.plot([x[i] for i in deficient], [y[i] for i in deficient], _RANK_DEFICIENT, color=color)
        ringed = [i for i, row in enumerate(members) if row.name in selected]
        axes.plot([x[i] for i in ringed], [y[i] for i in ringed], "o", mfc="none", mec=color, ms=8, mew=1.3)
    _draw_random(axes, by_type, colors)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("condition number κ")
    axes.grid(True, which="major", alpha=0.25)
    random = Line2D([], [], color="0.4", linestyle="--", linewidth=1.0, label="random matrix\nof that shape")
    handles = [*(line for line in axes.get_lines() if not str(line.get_label()).startswith("_")), random]
    axes.legend(handles=handles, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_random(axes: Axes, by_type: Mapping[str, Sequence[SpectralRow]], colors: Mapping[str, str]) -> None:
    """Draws a dashed line for each module type and shape. Lines of the same height alternate their dashes."""
    heights: dict[float, list[str]] = defaultdict(list)
    for module_type, members in sorted(by_type.items()):
        # A matrix and its transpose have the same condition number, so the order of the sides does not count.
        for shape in {(min(row.matrix_shape), max(row.matrix_shape)) for row in members}:
            heights[expected_condition_number(*shape)].append(module_type)
    for height, module_types in heights.items():
        for index, module_type in enumerate(module_types):
            style = dashes(index, len(module_types))
            axes.axhline(height, color=colors[module_type], linestyle=style, linewidth=1.0, zorder=1)
