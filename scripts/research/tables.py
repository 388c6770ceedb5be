"""Markdown tables, and the few ways in which the reports write a figure.

>>> print("\n".join(table(["arm", "KL"], [["lora", with_interval(0.123, 0.1, 0.15)]])))
| arm | KL |
| --- | --- |
| lora | 0.12 [0.10, 0.15] |
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["rows_of_cells", "spread", "table", "with_interval"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        head: Of the columns; the first one is that of the row labels.
        rows: As many cells each as the head has.

    Raises:
        ValueError: A row of another length; Markdown would draw it without a warning.
    """
    body = [list(row) for row in rows]
    for row in body:
        if len(row) != len(head):
            raise ValueError(f"{len(row)} cells under {len(head)} columns: {row}")
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def rows_of_cells(cells: dict[str, list[str]]) -> list[list[str]]:
    """Label -> cells, as rows; those without any content are left out."""
    return [[label, *row] for label, row in cells.items() if any(row)]


def with_interval(value: float, low: float, high: float, *, digits: int = 2) -> str:
    """`0.12 [0.01, 0.23]`; the value alone where there is no interval (nan)."""
    interval = "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{interval}"


def spread(values: NDArray[np.float64], form: str = "{:.2f}") -> str:
    """`median (lowest to highest)`."""
    middle, low, high = (form.format(value) for value in (np.median(values), values.min(), values.max()))
    return f"{middle} ({low} to {high})"
