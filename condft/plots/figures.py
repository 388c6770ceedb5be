"""What the pictures share: one colour a module type, short labels, dashes that tell lines apart, atomic saving."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from condft.files import atomic_path

__all__ = ["colours_of", "dashes", "save_figure", "short_labels"]


def colours_of(module_types: Iterable[str]) -> dict[str, str]:
    """A colour for each module type, the same in every picture of the same types."""
    return {name: f"C{index % 10}" for index, name in enumerate(sorted(set(module_types)))}


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Each name without the leading parts that all of them share, and without what stands before a layer's `*`."""
    full = sorted(set(names))
    tails = {name: name.rpartition("*.")[2] or name for name in full}
    return tails if len(set(tails.values())) == len(full) else {name: name for name in full}


def dashes(index: int, count: int, length: float = 4.0) -> tuple[float, Sequence[float]]:
    """Line style of the index-th of `count` lines that lie on each other: their dashes take turns.

    Returns:
        Offset and on/off lengths, in points, as matplotlib takes them.
    """
    return (-length * index % (length * max(count, 2)), (length, length * max(count - 1, 1)))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure atomically; the path's suffix is the format.

    Raises:
        ValueError: A format that matplotlib does not know (names those it does).
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
