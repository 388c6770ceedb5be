"""Pictures are made, in the format asked for, from every kind of report."""

import matplotlib.image
import numpy as np
import pytest

from condft import analyze, select_units
from condft.plots import plot_comparison, plot_condition_numbers, plot_spectra, plot_training
from condft.plots.figures import check_picture_path, dashes
from condft.report import SpectralReport
from tests.helpers.reports import make_row


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


def test_training_curves(tmp_path):
    metrics = [
        {"stage": 1 + (i > 3), "loss": 5.0 / (i + 1), "grad_norm": 1.0, "learning_rate": {"projector": 1e-3}}
        for i in range(9)
    ]
    plot_training(metrics, tmp_path / "t.png")
    plain = matplotlib.image.imread(tmp_path / "t.png")
    assert plain.ndim == 3
    distilled = [line | ({"self_distillation_kl": 0.01 * i} if i % 2 else {}) for i, line in enumerate(metrics)]
    plot_training(distilled, tmp_path / "t.png")
    assert not np.array_equal(matplotlib.image.imread(tmp_path / "t.png"), plain)


def test_a_selection_of_another_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 selected units have no row"):
        plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / "x.png", selected=["v.weight"])


def test_spectra(tiny_llama, tmp_path):
    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "v_proj")]
    report = analyze(tiny_llama(), names=names, spectrum=True, progress=False)
    plot_spectra(report, names, tmp_path / "s.png")
    assert matplotlib.image.imread(tmp_path / "s.png").shape[1] > 800
    without = analyze(tiny_llama(), names=names, progress=False)
    with pytest.raises(ValueError, match="no singular values of 2 of 2 units"):
        plot_spectra(without, names, tmp_path / "t.png")
    with pytest.raises(ValueError, match="0 spectra were asked for"):
        plot_spectra(report, [], tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


@pytest.mark.parametrize("kappa", [3.0, float("inf")])
def test_two_reports_against_each_other(kappa, tmp_path):
    a, b = (SpectralReport((make_row("u.weight", value),)) for value in (2.0, kappa))
    plot_comparison(a, b, tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize("name", ["old", "old.xyz", ".png"])
def test_a_path_without_the_suffix_of_a_picture_is_refused_before_anything_is_written(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"/{name} .* such as \.png, \.svg or \.pdf"):
        plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("name", ["k.png", "k.PNG", "k.svg", "k.pdf"])
def test_suffixes_of_pictures_are_taken_in_either_case(name, tmp_path):
    check_picture_path(name)
    plot_condition_numbers(SpectralReport((make_row("u.weight", 2.0),)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_dashes_of_lines_on_each_other_take_turns(index, count):
    offset, (on, off) = dashes(index, count)
    start = (-offset) % (on + off)
    assert start == pytest.approx(index * on)
    assert on + off == pytest.approx(on * max(count, 2))
