"""Singular values of chosen units, compared with those of random matrices of the same shapes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condft.plots.figures import dashes, save_figure
from condft.report import SpectralReport, SpectralRow
from condft.selection.random_matrix import marchenko_pastur_quantile

__all__ = ["MAX_SPECTRA", "plot_spectra"]

MAX_SPECTRA = 40  # more lines cannot be distinguished


def plot_spectra(report: SpectralReport, names: Sequence[str], path: str | Path) -> None:
    r"""Singular values of units by rank, $\sigma_i/\sigma_1$ over $i/n$, all axes logarithmic.

    The left panel counts ranks from the largest value, the right panel from the smallest, so that both ends are
    visible: κ is their ratio. Dashed: the Marchenko-Pastur law for the same shape, its i-th value at the quantile
    1 - (i - 1/2)/n. A flat line is a weight that passes every direction on; a steep one has specialized.

    Args:
        report: Of an analysis with `spectrum=True`.
        names: Of the units to draw, `MAX_SPECTRA` at most.
        path: Image file; its suffix is the format. Written atomically.

    Raises:
        KeyError: A name that the report does not have.
        ValueError: No name or too many, a unit whose spectrum the report does not hold, or a zero matrix.

    Example:
        >>> from condft import analyze
        >>> names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"]
        >>> with_spectra = analyze(base, names=names, spectrum=True, progress=False)
        >>> plot_spectra(with_spectra, names, "spectra.png")
    """
    rows = _checked(report, names)
    figure = Figure(figsize=(12.0, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, row in enumerate(rows):
        label = f"{row.name.removesuffix('.weight')}  (κ {row.condition_number:.3g})"
        _draw(panels, row.spectrum or (), color=f"C{index % 10}", linewidth=1.1, label=label)
    # A matrix and its transpose have the same singular values.
    shapes = sorted({(min(row.matrix_shape), max(row.matrix_shape)) for row in rows})
    for index, (n, long) in enumerate(shapes):
        values = [marchenko_pastur_quantile(1.0 - (i - 0.5) / n, n, long) for i in range(1, n + 1)]
        style = dashes(0, 2, length=1.5 + 1.5 * index)
        _draw(panels, values, color="black", linestyle=style, linewidth=1.2, label=f"random {n} x {long}")
    for axes, end in zip(panels, ("largest", "smallest"), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel(f"rank from the {end}, i / n")
        axes.grid(True, which="major", alpha=0.25)
    panels[0].set_yscale("log")
    panels[0].set_ylabel(r"singular value $\sigma_i / \sigma_1$")
    panels[1].invert_xaxis()
    panels[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Singular values, and those of a random matrix (dashed); the right end is 1/κ", fontsize=11)
    save_figure(figure, path)


def _checked(report: SpectralReport, names: Sequence[str]) -> list[SpectralRow]:
    if not 1 <= len(names) <= MAX_SPECTRA:
        raise ValueError(f"{len(names)} spectra for one picture: it takes 1 to {MAX_SPECTRA}")
    rows = [report[name] for name in names]
    lacking = [row.name for row in rows if row.spectrum is None]
    if lacking:
        raise ValueError(
            f"the report holds no singular values of {len(lacking)} of {len(rows)} units, such as {lacking[0]!r}: "
            "analyze with spectrum=True (--spectrum)"
        )
    zero = [row.name for row in rows if row.sigma_max == 0.0]
    if zero:
        raise ValueError(f"{zero[0]!r} is a zero matrix: its singular values have no shape to draw")
    return rows


def _draw(panels: Iterable[Axes], values: Sequence[float], **style: Any) -> None:
    """One descending spectrum into both panels. Zeros are left out: a logarithmic axis has no place for them."""
    n = len(values)
    kept = [value / values[0] for value in values if value > 0.0]
    from_largest = [(i + 1) / n for i in range(len(kept))]
    from_smallest = [(n - i) / n for i in range(len(kept))]
    for axes, x in zip(panels, (from_largest, from_smallest), strict=True):
        axes.plot(x, kept, **style)
