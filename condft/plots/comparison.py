"""κ of two reports against each other, unit by unit."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.plots.figures import colors_of, save_figure, short_labels
from condft.report import SpectralReport, SpectralRow

__all__ = ["plot_comparison"]

_Pair = tuple[SpectralRow, SpectralRow]


def plot_comparison(a: SpectralReport, b: SpectralReport, path: str | Path) -> None:
    """Draws κ in B over κ in A for every unit that both have. Each module type has a color; the diagonal is dashed.

    Units of infinite κ in either report are crosses at three times the largest finite κ.

    Args:
        a: The report on the horizontal axis.
        b: The report on the vertical one.
        path: Image file; its suffix is the format. Written atomically.

    Raises:
        ValueError: No unit in common, or a suffix that is no picture format.

    Example:
        >>> from condft import analyze
        >>> _ = base.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)  # κ does not depend on the scale
        >>> plot_comparison(report, analyze(base, progress=False), "before_and_after.png")
    """
    by_type = _common_units(a, b)
    pairs = [(x.condition_number, y.condition_number) for members in by_type.values() for x, y in members]
    # An infinite value has no place on a logarithmic axis. Three times the largest finite one is clearly above it.
    ceiling = 3.0 * max((value for pair in pairs for value in pair if value < math.inf), default=10.0)
    figure = Figure(figsize=(8.0, 5.8), layout="constrained")
    axes = figure.subplots()
    colors, labels = colors_of(by_type), short_labels(by_type)
    for module_type, members in sorted(by_type.items()):
        _draw_type(axes, members, ceiling, color=colors[module_type], label=labels[module_type])
    diagonal = [min(ceiling, *(value for pair in pairs for value in pair)), ceiling]
    axes.plot(diagonal, diagonal, color="0.5", linestyle="--", linewidth=0.9, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"κ in {a.model}")
    axes.set_ylabel(f"κ in {b.model}")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Condition number of every unit, before and after", fontsize=11)
    save_figure(figure, path)


def _common_units(a: SpectralReport, b: SpectralReport) -> dict[str, list[_Pair]]:
    """The rows of units that both reports have, of the same shape, by module type."""
    others = {row.name: row for row in b.rows}
    by_type: dict[str, list[_Pair]] = defaultdict(list)
    for row in a.rows:
        if row.name in others and others[row.name].shape == row.shape:
            by_type[row.module_type].append((row, others[row.name]))
    if not by_type:
        raise ValueError(f"{a.model} and {b.model} have no unit in common")
    return by_type


def _draw_type(axes: Axes, members: Sequence[_Pair], ceiling: float, *, color: str, label: str) -> None:
    """Dots where both values are finite, crosses where one is not; only the dots are in the legend."""
    for marker, deficient in ((".", False), ("x", True)):
        points = [
            (min(x.condition_number, ceiling), min(y.condition_number, ceiling))
            for x, y in members
            if (math.inf in (x.condition_number, y.condition_number)) is deficient
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        shown = None if deficient else label
        axes.plot(x, y, marker, color=color, markersize=6, alpha=0.75, label=shown)
