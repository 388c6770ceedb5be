"""The Lanczos process: Ritz values lie within the spectrum, and it says truly when it has settled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condft.spectra.factor import cholesky_factor, eigenvalues_above, eigenvalues_below, gram_matrix, qr_factor
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


def test_settled_says_that_a_singular_value_is_within_the_tolerance():
    """One near the end, not always the end itself: see `start`. The routes prove, or ask another start vector."""
    for seed in range(10):
        matrix = random_matrix((400, 120), seed)
        values = reference(matrix)
        ends = golub_kahan(MatrixProducts(matrix, torch.float64), wanted="both", rtol=1e-3, max_steps=120)
        assert ends.settled
        assert np.abs(values / ends.largest - 1).min() <= 1e-3
        assert np.abs(values / ends.smallest - 1).min() <= 1e-3


@given(st.integers(2, 40), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_inertia_tells_on_which_side_of_a_bound_all_eigenvalues_lie(n, seed, dtype):
    matrix = random_matrix((3 * n, n), seed).to(dtype)
    values = reference(matrix) ** 2
    gram = gram_matrix(matrix, dtype)
    before = gram.clone()
    assert eigenvalues_above(gram, values[-1] * 0.999)
    assert not eigenvalues_above(gram, values[-1] * 1.001)
    assert eigenvalues_below(gram, values[0] * 1.001)
    assert not eigenvalues_below(gram, values[0] * 0.999)
    assert torch.equal(gram, before)


def test_the_gram_matrix_in_blocks_of_columns(monkeypatch):
    monkeypatch.setattr("condft.spectra.factor._LEAST_WIDTH", 3)
    matrix = random_matrix((50, 31))
    torch.testing.assert_close(gram_matrix(matrix, torch.float64).tril(), (matrix.T @ matrix).tril())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [400, 401])
def test_products_in_parts_are_the_plain_products(rows, transposed, monkeypatch):
    monkeypatch.setattr("condft.spectra.operators._SPLIT_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    matrix = random_matrix((30, rows)).mT if transposed else random_matrix((rows, 30))
    products = MatrixProducts(matrix, torch.float64)
    x, y = torch.randn(30, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    torch.testing.assert_close(products.apply(x), matrix @ x)
    torch.testing.assert_close(products.apply_transposed(y), matrix.T @ y)


def test_every_start_is_another_vector():
    """torch's generator on the CPU reads 32 bits of its seed: starts told apart above those were all the same."""
    products = MatrixProducts(random_matrix((300, 100)), torch.float64)
    found = {golub_kahan(products, wanted="largest", rtol=0.0, max_steps=3, start=start).largest for start in range(4)}
    assert len(found) == 4


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
    for inverse in (Inverse(factors, pivots), TriangularInverse(qr_factor(square).mT)):
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
    cholesky = cholesky_factor(gram_matrix(matrix, torch.float64))
    assert cholesky is not None
    for factor, rtol in ((qr_factor(matrix), 1e-12), (cholesky.mT, 1e-9)):
        assert torch.equal(factor, factor.triu())
        np.testing.assert_allclose(reference(factor), values, rtol=rtol)
    assert cholesky_factor(gram_matrix(planted((60, 20), np.geomspace(1e10, 1.0, 20)), torch.float64)) is None
