"""The benchmark's command: its parts, and how they are shown."""

import pytest

from scripts.bench.analyzer.run import PARTS, limits, show


def test_limits_are_measured_for_each_shape() -> None:
    rows = limits(1, shapes=((48, 32),))
    assert [(row["shape"], row["measures"]) for row in rows] == [((48, 32), "basic"), ((48, 32), "all")]
    assert all(row["ratio"] > 0 for row in rows)


def test_results_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    race = {
        "work": "small",
        "seconds": {"selector": 2.0, "basic": 0.5, "second_start": 0.01},
        "speedup": 4.0,
        "speedup_all": 3.5,
        "target": 3.0,
        "second_start_share": 0.02,
    }
    error = {"shape": [4, 3], "dtype": "float32", "planted_kappa": 10.0, "error": None, "methods": ["svd"]}
    show({"races": {"small": race}, "error": [error]})
    shown = capsys.readouterr().out
    assert "4.0x" in shown
    assert "inf, or a lower bound by svd" in shown
    assert set(PARTS) >= {"error", "limits", "scaling"}
