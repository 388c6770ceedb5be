"""Paths of pictures, labels and dashes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.plots import plot_condition_numbers
from condft.plots.figures import check_picture_path, colors_of, dashes, short_labels
from condft.report import SpectralReport
from tests.helpers.records.reports import make_row


@pytest.mark.parametrize("name", ["old", "old.xyz", ".png"])
def test_a_path_without_the_suffix_of_a_picture_is_refused_before_anything_is_written(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"/{name} .* such as \.png, \.svg or \.pdf"):
        plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("name", ["k.png", "k.PNG", "k.svg", "k.pdf"])
def test_suffixes_of_pictures_are_accepted_in_either_case(name, tmp_path):
    check_picture_path(name)
    plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_dashes_of_lines_at_one_place_alternate(index, count):
    offset, (on, off) = dashes(index, count)
    start = (-offset) % (on + off)
    assert start == pytest.approx(index * on)
    assert on + off == pytest.approx(on * max(count, 2))


@given(st.lists(st.sampled_from(["a.*.q", "a.*.k", "b.*.q", "head", "embed"]), min_size=1))
def test_labels_are_short_and_distinct(names):
    labels = short_labels(names)
    assert set(labels) == set(names)
    assert len(set(labels.values())) == len(set(names))
    assert all(name.endswith(label) for name, label in labels.items())


def test_colors_do_not_depend_on_the_order():
    assert colors_of(["b", "a"]) == colors_of(["a", "b", "a"]) == {"a": "C0", "b": "C1"}
