"""Two reports in one picture."""

import pytest

from condft.plots import plot_comparison
from condft.report import SpectralReport
from tests.helpers.records.reports import make_row


@pytest.mark.parametrize("kappa", [3.0, float("inf")])
def test_two_reports_against_each_other(kappa, tmp_path):
    a, b = (SpectralReport((make_row("u.weight", value),)) for value in (2.0, kappa))
    plot_comparison(a, b, tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_only_units_of_both_with_one_shape_are_drawn(tmp_path):
    a = SpectralReport((make_row("u.weight", 2.0), make_row("v.weight", 2.0)), model="a")
    b = SpectralReport((make_row("u.weight", 2.0, shape=(8, 2)), make_row("w.weight", 2.0)), model="b")
    with pytest.raises(ValueError, match="a and b have no unit in common"):
        plot_comparison(a, b, tmp_path / "c.svg")
    assert list(tmp_path.iterdir()) == []
