"""One unit -> one row: the figures, what a row takes over from another one, and what it costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.analysis.measure import (
    RTOL,
    MeasureSpec,
    UnitInfo,
    digest_units,
    lower_bound,
    measure,
    measure_batch,
    merged_row,
    row_for_unit,
)
from condft.files.hashing import tensor_digest
from condft.report import Role, SpectralRow
from condft.spectra import rounding_noise
from condft.weights.unit import DeferredWeight, Unit

BASIC, ALL, SPECTRUM = MeasureSpec(), MeasureSpec("all"), MeasureSpec(spectrum=True)


def unit(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Unit:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Unit(f"{seed}.weight", values, values, "layer", Role.LAYER)


def row_of(one: Unit, spec: MeasureSpec = BASIC) -> SpectralRow:
    row = measure(one, spec)
    assert row is not None
    return row


def info(name: str, shape: tuple[int, int]) -> UnitInfo:
    return UnitInfo(name, shape, shape, "float32", "type", Role.LAYER, None, collective=False)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_row_has_the_figures_of_the_svd_and_bounds_are_below(rows: int, columns: int, seed: int) -> None:
    one = unit(rows, columns, seed)
    row = row_of(one)
    sigma = np.linalg.svd(one.tensor.double().numpy(), compute_uv=False)
    assert row.condition_number == pytest.approx(sigma[0] / sigma[-1], rel=1e-3)
    assert row.frobenius_norm == pytest.approx(np.linalg.norm(sigma), rel=1e-5)
    assert row.digest == tensor_digest(one.tensor)
    bound = lower_bound(one, 6)
    assert bound is not None
    assert 1.0 <= bound <= row.condition_number * (1 + RTOL)


def test_a_known_digest_is_taken_over() -> None:
    row = measure(unit(5, 4), BASIC, "known")
    assert row is not None
    assert row.digest == "known"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_have_neither_row_nor_bound(value: float) -> None:
    one = unit(96, 64)
    one.tensor[2, 3] = value
    assert measure(one, BASIC) is None
    assert lower_bound(one, 6) is None
    assert [row is None for row in measure_batch([one, unit(96, 64)], BASIC, [None, None])] == [True, False]


@pytest.mark.parametrize("spec", [BASIC, ALL, SPECTRUM])
def test_a_batch_gives_the_rows_of_its_units(spec: MeasureSpec) -> None:
    units = [unit(96, 64, seed) for seed in range(3)]
    for row, one in zip(measure_batch(units, spec, [None] * 3), units, strict=True):
        assert row is not None
        alone = row_of(one, spec)
        assert (row.name, row.digest, row.shape) == (alone.name, alone.digest, alone.shape)
        assert row.condition_number == pytest.approx(alone.condition_number, rel=1e-5)
        assert spec.satisfied_by(row)


def test_a_spec_says_what_a_row_must_hold_and_trims_the_rest() -> None:
    one = unit(6, 5)
    rows = {spec: row_of(one, spec) for spec in (BASIC, ALL, SPECTRUM)}
    satisfied = {(asked, given) for asked in rows for given in rows if asked.satisfied_by(rows[given])}
    assert satisfied == {(BASIC, BASIC), (BASIC, ALL), (BASIC, SPECTRUM), (ALL, ALL), (ALL, SPECTRUM)} | {
        (SPECTRUM, SPECTRUM)
    }
    assert BASIC.trimmed(rows[SPECTRUM]).spectrum is None
    assert BASIC.trimmed(rows[SPECTRUM]).log_volume is None
    assert ALL.trimmed(rows[SPECTRUM]).log_volume is not None


def test_a_row_lacks_nothing_that_an_earlier_one_holds() -> None:
    one = unit(6, 5)
    whole, basic = row_of(one, SPECTRUM), row_of(one)
    assert merged_row(basic, None) is basic
    merged = merged_row(basic, whole)
    assert (merged.spectrum, merged.log_volume) == (whole.spectrum, whole.log_volume)
    assert merged.condition_number == basic.condition_number
    assert merged_row(whole, basic) == whole


def test_a_row_of_equal_values_gets_the_type_the_role_and_the_noise_of_the_unit() -> None:
    one = unit(64, 64)
    row = row_of(one)
    coarse = replace(UnitInfo.of(one), module_type="other", role=Role.EXPERT, rounding_error=0.25)
    found = row_for_unit(row, coarse)
    assert (found.module_type, found.role) == ("other", Role.EXPERT)
    assert found.noise_floor == rounding_noise((64, 64), 0.25, row.frobenius_norm)
    assert row.resolved
    assert not found.resolved
    assert row_for_unit(found, UnitInfo.of(one)) == row


def test_digests_are_those_of_the_values_in_memory_and_elsewhere() -> None:
    units = [unit(5, 4, seed) for seed in range(4)]
    values = torch.randn(3, 2)
    deferred = DeferredWeight((3, 2), torch.float32, lambda: values)
    units.append(Unit("far", deferred.stand_in, deferred.stand_in, "layer", Role.LAYER, deferred))
    expected = {one.name: tensor_digest(one.tensor) for one in units[:4]} | {"far": tensor_digest(values)}
    assert digest_units(units) == expected
    assert digest_units([]) == {}


def test_the_cost_is_higher_for_what_takes_longer() -> None:
    wide, square = info("wide", (1024, 4096)), info("square", (4096, 4096))
    assert info("tall", (4096, 1024)).cost(BASIC) == wide.cost(BASIC)
    assert wide.cost(BASIC) < info("nearly square", (3600, 4096)).cost(BASIC)
    assert info("small", (256, 4096)).cost(BASIC) < wide.cost(ALL) < square.cost(BASIC)
    assert square.cost(ALL) < square.cost(SPECTRUM)
