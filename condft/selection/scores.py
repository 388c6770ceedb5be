r"""The scores that rank units, each with its value for a random matrix of the unit's shape. Pure Python, no torch.

Every score has one value for a unit, `inf` or `-inf` for a rank-deficient one where the score says so. A score that is
computed from the weight alone also has an expectation from its shape (`condft.selection.random_matrix`). Comparing the
two shows how much of a ranking is shape.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean
from typing import Literal

from condft.report import SpectralRow
from condft.selection import random_matrix

__all__ = ["WHOLE_SPECTRUM_SCORES", "Score", "expected_score", "how_to_measure", "score_of", "shape_share"]

Score = Literal[
    "condition_number",
    "relative_condition_number",
    "entropy_deficit",
    "stable_rank",
    "log_volume",
    "fisher_information",
]

WHOLE_SPECTRUM_SCORES: frozenset[Score] = frozenset({"entropy_deficit", "log_volume"})

_RATIOS = frozenset(
    {"condition_number", "stable_rank"}
)  # compared by their logarithms; the others are in nats already
_NEGLIGIBLE = 1e-9  # nats per unit: a smaller difference is rounding


def score_of(row: SpectralRow, score: Score) -> float:
    r"""One unit's score; n is the smaller side of its matrix.

    Args:
        row: The unit's spectral facts.
        score: - `"condition_number"`: $\sigma_{\max}/\sigma_{\min}$ (the paper's); `inf` if rank-deficient.
            - `"relative_condition_number"`: its logarithm less that of a random matrix of the same shape, nats.
            - `"entropy_deficit"`: per dimension, nats: the row's divided by n; `inf` if rank-deficient.
            - `"stable_rank"`: $\|W\|_F^2/\sigma_{\max}^2$.
            - `"log_volume"`: per dimension, nats: the mean of $\log \sigma_i$; `-inf` if rank-deficient. The only
              one of these that changes when the weight is scaled.
            - `"fisher_information"`: the row's. It depends on the model, not on the weight alone: see
              `condft.add_fisher_information`.

    Returns:
        The score.

    Raises:
        ValueError: The score was not measured for this row.

    >>> row = report["model.layers.0.mlp.up_proj.weight"]
    >>> score_of(row, "condition_number") == row.condition_number
    True
    >>> abs(score_of(row, "relative_condition_number")) < 1  # a random weight is near its expectation, 0
    True
    """
    if score == "relative_condition_number":
        return random_matrix.relative_condition_number(row.condition_number, *row.matrix_shape)
    value: float | None = getattr(row, score)
    if value is None:
        raise ValueError(f"{score} of {row.name} was not measured: {how_to_measure(score)}")
    return value / min(row.matrix_shape) if score in WHOLE_SPECTRUM_SCORES else value


def how_to_measure(score: Score) -> str:
    """How to measure a score that a report may lack."""
    if score == "fisher_information":
        return "condft.add_fisher_information measures it for units that text passes through"
    return 'analyze with measures="all"'


def expected_score(matrix_shape: tuple[int, int], score: Score) -> float:
    """The score of a random matrix of that shape, its entries Gaussian of unit variance.

    Args:
        matrix_shape: Rows and columns.
        score: As in `score_of`.

    Returns:
        The median for `condition_number` and `stable_rank`, the mean for the others; 0 for
        `relative_condition_number` by its definition.

    Raises:
        ValueError: `fisher_information`, which does not follow from the shape.
    """
    match score:
        case "condition_number":
            return random_matrix.expected_condition_number(*matrix_shape)
        case "relative_condition_number":
            return 0.0
        case "entropy_deficit":
            return random_matrix.expected_entropy_deficit(*matrix_shape)
        case "stable_rank":
            return random_matrix.expected_stable_rank(*matrix_shape)
        case "log_volume":
            return random_matrix.expected_log_volume(*matrix_shape)
        case "fisher_information":
            raise ValueError("the Fisher information of a matrix does not follow from its shape")


def shape_share(strata: Iterable[Sequence[SpectralRow]], chosen: Collection[str], score: Score) -> float:
    r"""The share of a selection that shape alone explains.

    Let $s_i$ be unit i's score (as a logarithm for `condition_number` and `stable_rank`, so that all are additive)
    and $e_i$ the same for a random matrix of its shape. A selection by score opens a gap between the mean score of
    the chosen units and that of the candidates they were ranked against, $\bar s - \bar s_\text{chosen}$; matrices
    without any training would show the gap $\bar e - \bar e_\text{chosen}$ if the same ones were chosen. The share is
    the second gap divided by the first, limited to [0, 1]: the "explained" part of a difference of means (Oaxaca 1973,
    Blinder 1973). With several strata the gaps are summed over all chosen units, each against the mean of its stratum.

    So the share is 0 if each stratum has one shape only, for `relative_condition_number`, and if all candidates are
    chosen. It is near 1 if the chosen differ from the others no more than random matrices of their shapes do. It
    weighs shapes by their effect: a 192 x 576 and a 1536 x 576 matrix hardly differ, a 576 x 576 one does.

    Args:
        strata: The candidates, in the groups that were ranked within.
        chosen: Names of the chosen units.
        score: The score they were chosen by.

    Returns:
        A float in [0, 1]; 0 for `fisher_information`, which does not follow from shape. Units with an infinite score
        (rank-deficient ones) are left out of all means.
    """
    if score == "fisher_information":
        return 0.0
    gap = shape_gap = 0.0
    count = 0
    for rows in strata:
        finite = [(row.name, *pair) for row in rows if math.isfinite((pair := _actual_and_expected(row, score))[0])]
        inside = [(actual, expected) for name, actual, expected in finite if name in chosen]
        if not inside:  # nothing was chosen here, so there is no gap
            continue
        count += len(inside)
        gap += len(inside) * (fmean(a for _, a, _ in finite) - fmean(a for a, _ in inside))
        shape_gap += len(inside) * (fmean(e for _, _, e in finite) - fmean(e for _, e in inside))
    # The quotient of two roundings would be noise.
    if abs(gap) <= _NEGLIGIBLE * count or abs(shape_gap) <= _NEGLIGIBLE * count:
        return 0.0
    return min(max(shape_gap / gap, 0.0), 1.0)


def _actual_and_expected(row: SpectralRow, score: Score) -> tuple[float, float]:
    actual, expected = score_of(row, score), expected_score(row.matrix_shape, score)
    if score not in _RATIOS:
        return actual, expected
    return math.log(actual) if actual > 0.0 else -math.inf, math.log(expected)  # 0: the stable rank of a zero matrix
