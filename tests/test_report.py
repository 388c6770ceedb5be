"""Reports go to disk and come back whole, or say what is wrong."""

import dataclasses
import json
import math

import pytest

from condft.report import SkippedWeight, SkipReason, SpectralReport
from tests.helpers.reports import make_row


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
    assert loaded.row("a").log_volume is None
    assert loaded.row("b").matrix_shape == (2, 4)


def test_rows_are_sorted_and_the_fingerprint_ignores_their_order(report):
    assert [row.name for row in report.rows] == ["a", "b", "c"]
    reversed_report = dataclasses.replace(report, rows=report.rows[::-1])
    assert reversed_report.fingerprint == report.fingerprint
    other = dataclasses.replace(report, rows=(*report.rows[:2], make_row("c", digest="0" * 16)))
    assert other.fingerprint != report.fingerprint


def test_lookup_and_restriction(report):
    assert report.row("b").condition_number == 5.0
    assert [row.name for row in report.restricted({"c", "nobody"}).rows] == ["c"]
    with pytest.raises(KeyError, match="no unit named 'z' among the 3 rows"):
        report.row("z")


def test_a_name_stands_once():
    with pytest.raises(ValueError, match="more than once"):
        SpectralReport((make_row("a"), make_row("a")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "analyze the model again"),
        ({"version": 1}, "has version 1, this condft reads version 4: analyze the model again"),
        ({"format": "other"}, "not a spectral report"),
        ({"fingerprint": "0" * 64}, "fingerprint does not belong"),
        ({"rows": [{"name": "a"}]}, "damaged"),
        ({"rows": [{**make_row("a").__dict__, "matrix_shape": [4]}]}, "damaged"),
    ],
)
def test_foreign_and_damaged_files_are_told(report, tmp_path, change, message):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**report.to_dict(), **change}))
    with pytest.raises(ValueError, match=message) as error:
        SpectralReport.load(path)
    assert "r.json" in str(error.value)


def test_a_cut_file_is_told(report, tmp_path):
    path = tmp_path / "r.json"
    report.save(path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="not JSON"):
        SpectralReport.load(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"x\.png: not JSON: 'utf-8' codec"):
        SpectralReport.load(tmp_path / "x.png")
