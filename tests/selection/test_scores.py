"""Every score, its expectation from shape, and the share of a selection that shape explains."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.selection.random_matrix import expected_condition_number, relative_condition_number
from condft.selection.scores import WHOLE_SPECTRUM_SCORES, Score, expected_score, score_of, shape_share
from condft.spectra import spectral_facts
from tests.helpers.records.reports import make_row

SCORES = [score for score in get_args(Score) if score != "fisher_information"]  # that have an expectation from shape
SHAPES = {"v": (192, 576), "up": (1536, 576), "q": (576, 576)}


def row_of(name: str, matrix: torch.Tensor):
    return make_row(name, matrix_shape=tuple(matrix.shape), **vars(spectral_facts(matrix, measures="all")))


def random_rows(shape: tuple[int, int], count: int) -> list:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return [row_of(f"{shape}.{i}", torch.randn(shape, generator=generator)) for i in range(count)]


def rows_of_kappas(**kappas: float) -> list:
    """One row for each key such as `v3`: the letters name the shape."""
    return [make_row(name, kappa, matrix_shape=SHAPES[name.rstrip("0123456789")]) for name, kappa in kappas.items()]


def test_each_score_is_what_it_says():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    matrix = torch.cat([matrix, torch.zeros(2, 3, dtype=torch.float64)])
    row = row_of("w", matrix)
    volume = math.log(8.0) / 3
    assert score_of(row, "condition_number") == pytest.approx(4.0)
    assert score_of(row, "relative_condition_number") == pytest.approx(relative_condition_number(4.0, 5, 3))
    assert score_of(row, "stable_rank") == pytest.approx(21 / 16)
    assert score_of(row, "log_volume") == pytest.approx(volume)
    assert score_of(row, "entropy_deficit") == pytest.approx(0.5 * math.log(7.0) - volume)


def test_rank_deficient_units_have_infinite_scores():
    row = row_of("w", torch.ones(4, 4))
    assert score_of(row, "condition_number") == score_of(row, "relative_condition_number") == math.inf
    assert (score_of(row, "entropy_deficit"), score_of(row, "log_volume")) == (math.inf, -math.inf)
    assert math.isfinite(score_of(row, "stable_rank"))


def test_fisher_information_does_not_follow_from_shape():
    row = make_row("w", fisher_information=0.5)
    assert score_of(row, "fisher_information") == 0.5
    with pytest.raises(ValueError, match="does not follow from its shape"):
        expected_score(row.matrix_shape, "fisher_information")
    with pytest.raises(ValueError, match=r"fisher_information of w was not measured: condft.add_fisher_information"):
        score_of(make_row("w", fisher_information=None), "fisher_information")


@pytest.mark.parametrize("score", sorted(WHOLE_SPECTRUM_SCORES))
def test_a_score_that_was_not_measured_says_the_way_out(score):
    row = make_row("w", log_volume=None, entropy_deficit=None)
    with pytest.raises(ValueError, match=f'{score} of w was not measured: analyze with measures="all"'):
        score_of(row, score)
    assert score_of(row, "stable_rank") == 1.5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(24, 60), (32, 32)])
def test_random_matrices_have_the_expected_score(score, shape):
    values = [score_of(row, score) for row in random_rows(shape, 200)]
    expected = expected_score(shape, score)
    assert expected == pytest.approx(float(np.median(values)), rel=0.15, abs=0.15)


@given(
    st.sampled_from(SCORES),
    st.lists(st.tuples(st.sampled_from(sorted(SHAPES)), st.floats(1.0, 1e6)), min_size=1, max_size=20),
    st.integers(1, 20),
)
def test_share_is_a_fraction_and_vanishes_where_shape_cannot_matter(score, units, count):
    rows = [make_row(f"u{i}", kappa, matrix_shape=SHAPES[shape]) for i, (shape, kappa) in enumerate(units)]
    ranked = sorted(rows, key=lambda row: score_of(row, score))
    chosen = {row.name for row in ranked[:count]}
    assert 0.0 <= shape_share([rows], chosen, score) <= 1.0
    by_shape = [[row for row in rows if row.matrix_shape == shape] for shape in SHAPES.values()]
    assert shape_share(by_shape, chosen, score) == 0.0
    assert shape_share([rows], chosen, "relative_condition_number") == 0.0
    assert shape_share([rows], {row.name for row in rows}, score) == 0.0
    assert shape_share([rows], set(), score) == 0.0


def test_untrained_matrices_are_explained_by_shape_alone():
    rows = random_rows((16, 48), 30) + random_rows((32, 32), 30)
    ranked = sorted(rows, key=lambda row: row.condition_number)
    assert shape_share([rows], {row.name for row in ranked[:20]}, "condition_number") > 0.85
    assert shape_share([rows], {row.name for row in ranked[-20:]}, "condition_number") > 0.7


def test_share_is_the_ratio_of_the_two_gaps():
    """q lies e times as high as chance, v at chance: of the gap between them, one nat is not shape."""
    expected = {key: expected_condition_number(*shape) for key, shape in SHAPES.items()}
    rows = rows_of_kappas(v0=expected["v"], v1=expected["v"], q0=math.e * expected["q"], q1=math.e * expected["q"])
    shape_gap = math.log(expected["q"] / expected["v"])
    assert shape_share([rows], {"v0", "v1"}, "condition_number") == pytest.approx(shape_gap / (shape_gap + 1))
    assert shape_share([rows], {"q0", "q1"}, "condition_number") == pytest.approx(shape_gap / (shape_gap + 1))


def test_learning_against_the_shape_explains_nothing_by_shape():
    rows = rows_of_kappas(v0=1e5, v1=1e6, q0=5.0, q1=6.0)
    assert shape_share([rows], {"q0", "q1"}, "condition_number") == 0.0


def test_nearly_equal_shapes_explain_little():
    """v chosen before up: only a tenth of the gap between kappa 5 and 15 is that of the shapes."""
    rows = rows_of_kappas(v0=5.0, v1=5.0, up0=15.0, up1=15.0)
    assert 0.05 < shape_share([rows], {"v0", "v1"}, "condition_number") < 0.15


def test_ties_and_rank_deficient_units_do_not_count():
    tied = rows_of_kappas(v0=7.0, q0=7.0)
    assert shape_share([tied], {"v0"}, "condition_number") == 0.0
    rows = rows_of_kappas(v0=5.0, q0=3000.0)
    deficient = rows_of_kappas(q1=math.inf, v1=math.inf)
    share = shape_share([rows], {"v0"}, "condition_number")
    assert shape_share([rows + deficient], {"v0", "v1"}, "condition_number") == share > 0.5
    assert shape_share([deficient], {"v1"}, "condition_number") == 0.0
