"""What the pictures share: colors of module types, short labels, dashes, checked paths, atomic saving."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from condft.files.atomic import atomic_path

__all__ = ["check_picture_path", "colors_of", "dashes", "save_figure", "short_labels"]


def colors_of(module_types: Iterable[str]) -> dict[str, str]:
    """A color for each module type, the same in every picture of the same types."""
    return {name: f"C{index % 10}" for index, name in enumerate(sorted(set(module_types)))}


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Each name without the part up to a layer's `*.`; the full names where two would become equal.

    >>> short_labels(["model.layers.*.mlp.up_proj", "lm_head"])
    {'lm_head': 'lm_head', 'model.layers.*.mlp.up_proj': 'mlp.up_proj'}
    """
    full = sorted(set(names))
    tails = {name: name.rpartition("*.")[2] or name for name in full}
    return tails if len(set(tails.values())) == len(full) else {name: name for name in full}


def dashes(index: int, count: int, length: float = 4.0) -> tuple[float, Sequence[float]]:
    """Line style of the index-th of `count` lines at the same place: their dashes alternate, so that all are seen.

    Returns:
        Offset and on/off lengths, in points, as matplotlib takes them.
    """
    # Each line draws one dash of the period and leaves the others' open; its offset shifts it to its own place.
    return (-length * index % (length * max(count, 2)), (length, length * max(count - 1, 1)))


def check_picture_path(path: str | Path) -> None:
    """Refuses a path that the pictures' functions would refuse. Call it before a long analysis, not after it.

    Args:
        path: Of a picture to be written.

    Raises:
        ValueError: No suffix, or one that is no format of matplotlib.

    Example:
        >>> check_picture_path("kappa.png")
        >>> check_picture_path("kappa")
        Traceback (most recent call last):
        ValueError: kappa has no suffix, and the suffix is a picture's format: use one such as .png, .svg or .pdf
    """
    # matplotlib adds a suffix to a path without one, and would write another file than the one that was named.
    suffix = Path(path).suffix
    if suffix.lower().removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        had = f"the suffix {suffix!r}" if suffix else "no suffix"
        raise ValueError(f"{path} has {had}, and the suffix is a picture's format: use one such as .png, .svg or .pdf")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure atomically; the path's suffix is the format.

    Raises:
        ValueError: As `check_picture_path`, before anything is written.
    """
    check_picture_path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
