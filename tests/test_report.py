"""Reports go to disk and come back whole, or say what is wrong."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft.report import Role, SkippedWeight, SkipReason, SpectralReport, SpectralRow
from tests.helpers.records.reports import make_row

ROW = dataclasses.asdict(make_row("a"))
OLD_FILE = Path(__file__).parent / "helpers" / "report_version_4.json"


@pytest.fixture
def report() -> SpectralReport:
    skipped = (SkippedWeight("head.weight", (9, 2), SkipReason.TIED, "shares its memory with embed.weight"),)
    return SpectralReport(
        (make_row("b", spectrum=(5.0, 2.5, 1.0)), make_row("a", math.inf, spectrum=()), make_row("c", 1.0)),
        skipped,
        "tiny",
        {"torch": "x"},
    )


def test_round_trip_is_exact_and_strict_json(report, tmp_path):
    path = tmp_path / "deep" / "report.json"
    report.save(path)
    assert SpectralReport.load(path) == report
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_measures_that_were_not_taken_stay_unknown(tmp_path):
    partial = SpectralReport(
        (make_row("a", log_volume=None, entropy_deficit=None), make_row("b", matrix_shape=(2, 4)))
    )
    partial.save(tmp_path / "r.json")
    loaded = SpectralReport.load(tmp_path / "r.json")
    assert loaded == partial
    assert loaded["a"].log_volume is None
    assert loaded["b"].matrix_shape == (2, 4)


def test_rows_are_sorted_and_the_fingerprint_ignores_their_order(report):
    assert [row.name for row in report.rows] == ["a", "b", "c"]
    reversed_report = dataclasses.replace(report, rows=report.rows[::-1])
    assert reversed_report.fingerprint == report.fingerprint
    other = dataclasses.replace(report, rows=(*report.rows[:2], make_row("c", digest="0" * 16)))
    assert other.fingerprint != report.fingerprint


def test_a_report_is_a_sequence_of_rows(report):
    assert isinstance(report, Sequence)
    assert len(report) == 3
    assert [row.name for row in report] == ["a", "b", "c"]
    assert [row.name for row in reversed(report)] == ["c", "b", "a"]
    assert (report[0], report[-1]) == (report["a"], report["c"])
    assert report[1:] == report.rows[1:]
    with pytest.raises(IndexError):
        report[3]
    assert "b" in report
    assert report["b"] in report
    assert "z" not in report
    assert make_row("z") not in report
    assert bool(SpectralReport(()))


def test_lookup_by_name_and_restriction(report):
    assert report["b"].condition_number == 5.0
    assert [row.name for row in report.restricted({"c", "nobody"}).rows] == ["c"]
    with pytest.raises(KeyError, match=r"no unit named 'z' among the 3 rows of this report\""):
        report["z"]
    one = SpectralReport((make_row("model.layers.0.q_proj.weight"), make_row("model.norm.weight")))
    with pytest.raises(KeyError, match=r"; did you mean 'model\.layers\.0\.q_proj\.weight'\?"):
        one["layers.0.q_proj.weight"]


def test_the_repr_is_one_line(report):
    assert repr(report) == "<SpectralReport of tiny: 3 units, condition numbers 1 to inf, 1 weights skipped>"
    assert repr(SpectralReport(())) == "<SpectralReport: 0 units, 0 weights skipped>"


def test_the_rows_become_a_data_frame(report, monkeypatch):
    table = report.to_pandas()
    assert list(table.index) == ["a", "b", "c"]
    assert list(table.columns) == [field.name for field in dataclasses.fields(SpectralRow)][1:]
    assert table.loc["a", "condition_number"] == math.inf
    assert table.loc["b", "spectrum"] == (5.0, 2.5, 1.0)
    assert set(table["role"]) == {"layer"}
    assert SpectralReport(()).to_pandas().empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_pandas()


def test_a_file_of_an_earlier_release_loads_and_is_written_the_same(tmp_path):
    """The file was written by the code before pydantic read and wrote reports."""
    text = OLD_FILE.read_text(encoding="utf-8")
    report = SpectralReport.load(OLD_FILE)
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text
    lost = report["model.layers.1.q_proj.weight"]
    assert (lost.condition_number, lost.log_volume, lost.entropy_deficit) == (math.inf, -math.inf, math.inf)
    assert report["model.layers.0.q_proj.weight"].spectrum == (2.5, 0.10000000149011612)
    assert report["model.größe.weight"].spectrum == ()
    assert report["model.experts.up[3]"].role is Role.EXPERT
    assert report["model.experts.up[3]"].fisher_information == 1.25e-07
    assert {type(value) for value in (lost.shape, lost.matrix_shape)} == {tuple}
    assert [unit.condition_number_bound for unit in report.screened] == [1234.5, math.inf]
    assert report.skipped[-1] == SkippedWeight("model.packed.weight", (4, 4), SkipReason.QUANTIZED, "nf4")


def test_the_former_spelling_of_a_reason_still_loads(tmp_path):
    path = tmp_path / "older.json"
    path.write_text(OLD_FILE.read_text(encoding="utf-8").replace('"quantized"', '"quantised"'), encoding="utf-8")
    assert SpectralReport.load(path) == SpectralReport.load(OLD_FILE)
    with pytest.raises(ValueError, match="not a valid SkipReason"):
        SkipReason("quantist")


figures = st.floats(allow_nan=False)


@given(kappa=figures, volume=st.none() | figures, spectrum=st.none() | st.lists(st.floats(width=32, allow_nan=False)))
def test_any_figure_comes_back_as_it_was(kappa, volume, spectrum):
    row = make_row(
        "a", condition_number=kappa, log_volume=volume, spectrum=None if spectrum is None else tuple(spectrum)
    )
    text = json.dumps(SpectralReport((row,)).to_dict(), allow_nan=False)
    assert SpectralReport.from_dict(json.loads(text)).rows == (row,)


def test_a_name_occurs_once():
    with pytest.raises(ValueError, match="more than once"):
        SpectralReport((make_row("a"), make_row("a")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "analyze the model again"),
        ({"version": 1}, "has version 1, this condft reads version 4: analyze the model again"),
        ({"format": "other"}, "not a spectral report"),
        ({"fingerprint": "0" * 64}, "fingerprint does not belong"),
        (
            {"rows": [{"name": "a"}]},
            r"damaged: rows\[0\]\.shape: Field required \(and \d+ more\)\. Analyze the model",
        ),
        (
            {"rows": [{**ROW, "matrix_shape": [4]}]},
            r"damaged: rows\[0\]\.matrix_shape\[1\]: Field required",
        ),
        ({"rows": [{**ROW, "sigma_max": "much"}]}, r"rows\[0\]\.sigma_max: .* valid number"),
        ({"rows": [{**ROW, "role": "poet"}]}, r"rows\[0\]\.role: Input should be 'layer', "),
        (
            {"rows": [{**ROW, "spectrum": "AAA="}]},
            r"rows\[0\]\.spectrum: .* no whole number of fp32",
        ),
        ({"rows": [{**ROW, "rank": 3}]}, r"rows\[0\]\.rank: Unexpected keyword argument"),
        ({"rows": [ROW] * 2}, "damaged: a report has one row a unit"),
        ({"skipped": [{"name": "a", "shape": [2], "reason": "lost"}]}, r"skipped\[0\]\.reason: Input should be "),
        ({"measures": None}, "damaged: measures: Input should be a valid string"),
        ({"skiped": []}, "damaged: skiped: Unexpected keyword argument"),
    ],
)
def test_the_error_names_file_field_and_way_out(report, tmp_path, change, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**report.to_dict(), **change}))
    with pytest.raises(ValueError, match=message) as error:
        SpectralReport.load(path)
    assert "r.json" in str(error.value)


def test_a_cut_file_is_not_json(report, tmp_path):
    path = tmp_path / "r.json"
    report.save(path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="not JSON"):
        SpectralReport.load(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"x\.png: not JSON: 'utf-8' codec"):
        SpectralReport.load(tmp_path / "x.png")
