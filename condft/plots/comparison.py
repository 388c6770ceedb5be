"""κ of two reports against each other, unit by unit."""

import math
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from condft.plots.figures import colors_of, save_figure, short_labels
from condft.report import SpectralReport, SpectralRow

__all__ = ["plot_comparison"]


def plot_comparison(a: SpectralReport, b: SpectralReport, path: str | Path) -> None:
    """κ in B over κ in A for every unit that both have, one color a module type, the diagonal dashed.

    Units of infinite κ in either stand as crosses at three times the largest finite κ.

    Args:
        a: The report on the horizontal axis.
        b: The report on the vertical one.
        path: Image file; its suffix is the format. Written atomically.

    Raises:
        ValueError: No unit in common.
    """
    others = {row.name: row for row in b.rows}
    by_type: dict[str, list[tuple[SpectralRow, SpectralRow]]] = defaultdict(list)
    for row in a.rows:
        if row.name in others and others[row.name].shape == row.shape:
            by_type[row.module_type].append((row, others[row.name]))
    if not by_type:
        raise ValueError(f"{a.model} and {b.model} have no unit in common")
    pairs = [(x.condition_number, y.condition_number) for members in by_type.values() for x, y in members]
    ceiling = 3.0 * max((value for pair in pairs for value in pair if value < math.inf), default=10.0)
    figure = Figure(figsize=(8.0, 5.8), layout="constrained")
    axes = figure.subplots()
    colors, labels = colors_of(by_type), short_labels(by_type)
    for module_type, members in sorted(by_type.items()):
        for marker, deficient in ((".", False), ("x", True)):
            points = [
                (min(x.condition_number, ceiling), min(y.condition_number, ceiling))
                for x, y in members
                if (math.inf in (x.condition_number, y.condition_number)) is deficient
            ]
            x, y = [p[0] for p in points], [p[1] for p in points]
            label = None if deficient else labels[module_type]
            axes.plot(x, y, marker, color=colors[module_type], markersize=6, alpha=0.75, label=label)
    floor = min(value for pair in pairs for value in pair)
    axes.plot(
        [min(floor, ceiling), ceiling],
        [min(floor, ceiling), ceiling],
        color="0.5",
        linestyle="--",
        linewidth=0.9,
        zorder=1,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"κ in {a.model}")
    axes.set_ylabel(f"κ in {b.model}")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Condition number of every unit, before and after", fontsize=11)
    save_figure(figure, path)
