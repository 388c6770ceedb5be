"""The analyzer's parts of the check, at small size."""

import pytest

from scripts.bench.gpu import analyzer
from scripts.bench.gpu.part import Place

CPU = Place("cpu", small=True)


def test_no_route_is_off() -> None:
    found = analyzer.routes(CPU)
    assert found["problems"] == []
    assert max(found["largest_error_by_route"].values()) < 1e-2


def test_a_route_that_is_off_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyzer, "_condition_number", lambda matrix: 1.0)
    assert "off by" in analyzer.routes(CPU)["problems"][0]
    assert analyzer.batches(CPU)["problems"]


def test_kappa_is_that_of_svdvals() -> None:
    found = analyzer.kappa_of_8b(CPU)
    assert found["problems"] == []
    assert len(found["weights"]) == 7
    assert found["speedup"] == found["seconds_a_layer_svdvals"] / found["seconds_a_layer"]
