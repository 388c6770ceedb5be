"""Singular values of chosen units, beside those of random matrices of the same shapes."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.plots.figures import dashes, save_figure
from condft.random_matrix import marchenko_pastur_quantile
from condft.report import SpectralReport, SpectralRow

__all__ = ["MAX_SPECTRA", "plot_spectra"]

MAX_SPECTRA = 40  # more lines than that cannot be told apart

_POINTS = 400  # of a Marchenko-Pastur curve


def plot_spectra(report: SpectralReport, names: Sequence[str], path: str | Path) -> None:
    r"""Singular values of units over their rank, both axes logarithmic: $\sigma_i/\sigma_1$ over $i/n$.

    A line's right end stands at 1/κ. Dashed: the Marchenko-Pastur law of the same shape, its i-th value at the
    quantile 1 - (i - 1/2)/n. A flat line is a weight that passes every direction on; a steep one has specialised.

    Args:
        report: Of an analysis with `spectrum=True`.
        names: Of the units to draw, `MAX_SPECTRA` at most.
        path: Image file; its suffix is the format. Written atomically.

    Raises:
        KeyError: A name that the report does not have.
        ValueError: No name or too many, a unit whose spectrum the report does not hold, or a zero matrix.
    """
    if not 1 <= len(names) <= MAX_SPECTRA:
        raise ValueError(f"{len(names)} spectra were asked for: one picture takes 1 to {MAX_SPECTRA}")
    rows = [report.row(name) for name in names]
    lacking = [row.name for row in rows if row.spectrum is None]
    if lacking:
        raise ValueError(
            f"the report holds no singular values of {len(lacking)} of {len(rows)} units, such as {lacking[0]!r}: "
            "analyze with spectrum=True (--spectrum)"
        )
    zero = [row.name for row in rows if row.sigma_max == 0.0]
    if zero:
        raise ValueError(f"{zero[0]!r} is a zero matrix: its singular values have no shape to draw")
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        _draw_spectrum(axes, row, f"C{index % 10}")
    shapes = sorted({(min(row.matrix_shape), max(row.matrix_shape)) for row in rows})
    for index, shape in enumerate(shapes):
        _draw_random(axes, shape, index)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank i / n")
    axes.set_ylabel(r"singular value $\sigma_i / \sigma_1$ (right end: 1/κ)")
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Singular values, and those of a random matrix (dashed)", fontsize=11)
    save_figure(figure, path)


def _draw_spectrum(axes: Axes, row: SpectralRow, colour: str) -> None:
    values = [value for value in row.spectrum or () if value > 0.0]  # zeros have no place on a logarithmic axis
    n = len(row.spectrum or ())
    label = f"{row.name.removesuffix('.weight')}  (κ {row.condition_number:.3g})"
    x = [(i + 1) / n for i in range(len(values))]
    axes.plot(x, [value / values[0] for value in values], color=colour, linewidth=1.1, label=label)


def _draw_random(axes: Axes, shape: tuple[int, int], index: int) -> None:
    n, long = shape
    # Points evenly apart on a logarithmic axis, both ends included: the lower edge matters as much as the upper one.
    ranks = sorted({min(n, max(1, round(n ** (i / _POINTS)))) for i in range(_POINTS + 1)} | _near_the_end(n))
    values = [marchenko_pastur_quantile(1.0 - (rank - 0.5) / n, n, long) for rank in ranks]
    grey = str(0.15 + 0.15 * (index % 5))
    style = dashes(index, 1, length=3.0 + 2.0 * index)
    x = [rank / n for rank in ranks]
    axes.plot(
        x, [v / values[0] for v in values], color=grey, linestyle=style, linewidth=1.3, label=f"{n} x {long} random"
    )


def _near_the_end(n: int) -> set[int]:
    return set(range(max(1, n - 20), n + 1))
