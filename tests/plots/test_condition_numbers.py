"""Pictures of κ by depth."""

import matplotlib.image
import pytest

from condft import analyze, select_units
from condft.plots import plot_condition_numbers
from condft.report import SpectralReport
from tests.helpers.records.reports import make_row


def test_condition_numbers(tiny_llama, tmp_path):
    report = analyze(tiny_llama(), progress=False)
    names = select_units(report, trainable_fraction=0.3).names
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    plot_condition_numbers(report, plain)
    plot_condition_numbers(report, marked, selected=names)
    assert matplotlib.image.imread(marked).shape[1] > 800
    assert (matplotlib.image.imread(plain).shape != matplotlib.image.imread(marked).shape) or (
        matplotlib.image.imread(plain) != matplotlib.image.imread(marked)
    ).any()


@pytest.mark.parametrize("kappas", [(float("inf"),), (1.0, float("inf")), (2.0,)])
def test_infinite_and_lonely_units(kappas, tmp_path):
    rows = tuple(make_row(f"u{i}.weight", kappa) for i, kappa in enumerate(kappas))
    plot_condition_numbers(SpectralReport(rows), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().lstrip().startswith("<?xml")


def test_a_selection_of_another_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 selected units have no row"):
        plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / "x.png", selected=["v.weight"])
