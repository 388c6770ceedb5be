"""Factorizations keep the singular values, and inertia proves on which side of a bound eigenvalues are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.spectra.factor import (
    cholesky_factor,
    eigenvalues_above,
    eigenvalues_below,
    gram_matrix,
    qr_factor,
    singular_values,
)
from tests.helpers.planted import planted, random_matrix, reference


@given(st.integers(2, 40), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_inertia_shows_on_which_side_of_a_bound_all_eigenvalues_are(n, seed, dtype):
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
    torch.testing.assert_close(gram_matrix(matrix, torch.float64), matrix.T @ matrix)


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


@pytest.mark.parametrize("shape", [(1, 1), (40, 12), (12, 40), (30, 30), (25, 13)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_are_numpys(shape, dtype):
    matrix = random_matrix(shape).to(dtype)
    found = singular_values(matrix)
    assert (found.dtype, tuple(found.shape)) == (torch.float64, (min(shape),))
    np.testing.assert_allclose(found.numpy(), reference(matrix), rtol=1e-12)
