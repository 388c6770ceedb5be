"""Fits and extrapolations of the analyzer's cost."""

from pathlib import Path

import pytest

from scripts.bench.analyzer.scaling import COUNTS, LARGE_MODELS, SIZES, extrapolate, fitted, plot_scaling


def found() -> dict:
    seconds = [2e-9 * n**2.5 for n in SIZES]
    part = {"seconds": seconds, **fitted(seconds)}
    number = {"seconds": [0.1 * count for count in COUNTS], "per_weight": 0.1, "offset": 0.0}
    return {"sizes": list(SIZES), "counts": list(COUNTS), "square": part, "tall": part, "number": number}


def test_a_power_law_is_found_again() -> None:
    fit = fitted([2e-9 * n**2.5 for n in SIZES])
    assert fit["exponent"] == pytest.approx(2.5)
    assert fit["factor"] == pytest.approx(2e-9)


def test_hours_grow_with_the_flops() -> None:
    rows = extrapolate(found())
    assert [row["model"] for row in rows] == list(LARGE_MODELS)
    twice = extrapolate({name: {"seconds": [2 * s for s in found()[name]["seconds"]]} for name in ("square", "tall")})
    assert [row["hours"] for row in twice] == pytest.approx([2 * row["hours"] for row in rows])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot_scaling(found(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
