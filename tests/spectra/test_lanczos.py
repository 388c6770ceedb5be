"""The Lanczos process: Ritz values lie within the spectrum, and it says truly when it has settled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condft.spectra.factor import cholesky_factor, qr_factor
from condft.spectra.lanczos import golub_kahan
from condft.spectra.operators import Inverse, MatrixProducts, TriangularInverse
from tests.spectra.planted import planted, random_matrix, reference


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 80), st.integers(0, 100))
def test_ritz_values_lie_within_the_spectrum(n, more, steps, seed):
    matrix = random_matrix((n + more, n), seed)
    values = reference(matrix)
    ends = golub_kahan(MatrixProducts(matrix, torch.float64), wanted="both", rtol=0.0, max_steps=steps)
    assert values[-1] * (1 - 1e-10) <= ends.smallest <= ends.largest <= values[0] * (1 + 1e-10)
    assert ends.steps <= min(n, steps)


def test_settled_means_within_the_tolerance():
    for seed in range(10):
        matrix = random_matrix((400, 120), seed)
        values = reference(matrix)
        ends = golub_kahan(MatrixProducts(matrix, torch.float64), wanted="both", rtol=1e-3, max_steps=120)
        assert ends.settled
        assert ends.largest / ends.smallest == pytest.approx(values[0] / values[-1], rel=1e-3)


def test_too_few_steps_are_told():
    matrix = planted((200, 100), np.geomspace(1e4, 1.0, 100))
    assert not golub_kahan(MatrixProducts(matrix, torch.float64), wanted="both", rtol=1e-6, max_steps=12).settled


def test_stopping_early():
    matrix = planted((200, 100), np.geomspace(1e4, 1.0, 100))
    ends = golub_kahan(MatrixProducts(matrix, torch.float64), wanted="both", rtol=0.0, max_steps=100, stop_above=20.0)
    assert ends.largest / ends.smallest > 20.0
    assert ends.steps < 60


def test_inverses_give_the_smallest_singular_value():
    square = random_matrix((90, 90))
    values = reference(square)
    factors, pivots = torch.linalg.lu_factor(square)
    for inverse in (Inverse(factors, pivots), TriangularInverse(qr_factor(square))):
        ends = golub_kahan(inverse, wanted="largest", rtol=1e-6, max_steps=90)
        assert ends.settled
        assert 1.0 / ends.largest == pytest.approx(values[-1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_in_blocks_are_the_plain_products(dtype, monkeypatch):
    monkeypatch.setattr("condft.spectra.operators._BLOCK_BYTES", 1000)
    matrix = random_matrix((70, 30)).to(dtype)
    products = MatrixProducts(matrix, torch.float64)
    x, y = torch.randn(30, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    torch.testing.assert_close(products.apply(x), matrix.double() @ x)
    torch.testing.assert_close(products.apply_transposed(y), matrix.double().T @ y)


def test_factors_have_the_matrix_s_singular_values(monkeypatch):
    monkeypatch.setattr("condft.spectra.operators._BLOCK_BYTES", 1000)
    matrix = planted((5000, 20), np.geomspace(1e3, 1.0, 20)).float()
    values = reference(matrix)
    for factor, rtol in ((qr_factor(matrix), 1e-12), (cholesky_factor(matrix), 1e-9)):
        assert factor is not None
        assert torch.equal(factor, factor.triu())
        np.testing.assert_allclose(reference(factor), values, rtol=rtol)
    assert cholesky_factor(planted((60, 20), np.geomspace(1e10, 1.0, 20))) is None
