"""The study's own selections, on a spectrum by hand and on a small model."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condft import SpectralReport, analyze
from condft.report import Role
from scripts.research.selections import (
    choose,
    highest_signal_to_noise,
    kind_of,
    same_shapes_and_depths,
    signal_to_noise,
)
from tests.helpers.models.tiny_llama import build_tiny_llama


@pytest.fixture(scope="module")
def report() -> SpectralReport:
    """Of a Llama of 6 layers, layer weights only."""
    whole = analyze(build_tiny_llama(layers=6), measures="all", spectrum=True, progress=False)
    return replace(whole, rows=tuple(row for row in whole.rows if row.role is Role.LAYER))


def parameters(report: SpectralReport, names: tuple[str, ...]) -> float:
    return sum(row.num_parameters for row in report.rows if row.name in names) / sum(
        row.num_parameters for row in report.rows
    )


def test_few_kinds_spend_the_budget_of_all(report: SpectralReport) -> None:
    names = choose(report, 0.2, kinds=("gate_proj", "up_proj"))
    assert {kind_of(name) for name in names} == {"gate_proj", "up_proj"}
    assert parameters(report, names) == pytest.approx(0.2, abs=0.05)
    with pytest.raises(ValueError, match="less than the budget"):
        choose(report, 0.9, kinds=("k_proj",))


@given(st.integers(0, 10_000))
def test_a_draw_has_the_shapes_and_depths_of_its_reference(report: SpectralReport, seed: int) -> None:
    reference = choose(report, 0.3, stratify=None)
    drawn = same_shapes_and_depths(report, reference, seed=seed)
    rows = {row.name: row for row in report.rows}

    def described(names: tuple[str, ...]) -> list[tuple[tuple[int, ...], int]]:
        return sorted((rows[name].shape, int(name.split(".")[2]) // 2) for name in names)

    assert described(drawn) == described(reference)
    assert len(set(drawn)) == len(drawn)
    assert drawn == same_shapes_and_depths(report, reference, seed=seed)


def test_seeds_draw_differently(report: SpectralReport) -> None:
    reference = choose(report, 0.3, stratify=None)
    assert len({same_shapes_and_depths(report, reference, seed=seed) for seed in range(8)}) > 1


def test_the_signal_to_noise_ratio_is_that_of_its_definition(report: SpectralReport) -> None:
    row = replace(report.rows[0], matrix_shape=(4, 4), sigma_max=20.0, spectrum=(20.0, 3.0, 2.0, 1.0, 0.5))
    edge = (3.0 - 1.0) / 1.349 * 2  # quartiles 1 and 3, a square matrix
    assert 2.0 < edge < 3.0
    assert signal_to_noise(row) == pytest.approx((20 + 3) / (2 + 1 + 0.5) / 20)
    assert signal_to_noise(replace(row, spectrum=(1.0, 1.0, 1.0, 1.0))) == math.inf
    with pytest.raises(ValueError, match="spectrum=True"):
        signal_to_noise(replace(row, spectrum=None))


def test_the_highest_ratios_of_each_type_are_taken_within_the_budget(report: SpectralReport) -> None:
    names = highest_signal_to_noise(report, 1 / 3)
    assert parameters(report, names) == pytest.approx(1 / 3)
    for module_type in {row.module_type for row in report.rows}:
        rows = [row for row in report.rows if row.module_type == module_type]
        taken = [signal_to_noise(row) for row in rows if row.name in names]
        left = [signal_to_noise(row) for row in rows if row.name not in names]
        assert len(taken) == 2
        assert min(taken) >= max(left)
