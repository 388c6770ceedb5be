"""Products in blocks and in parts are the plain products, and inverses have the inverse spectrum."""

import pytest
import torch

from condft.spectra.factor import qr_factor
from condft.spectra.lanczos import BlockLanczos
from condft.spectra.operators import (
    GramProducts,
    Inverse,
    SymmetricProducts,
    TriangularInverse,
    iter_row_blocks,
    times_columns,
    times_rows,
)
from tests.helpers.planted import random_matrix, reference


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [400, 401])
def test_products_in_parts_are_the_plain_products(rows, transposed, monkeypatch):
    monkeypatch.setattr("condft.spectra.operators._SPLIT_FROM", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    matrix = random_matrix((30, rows)).mT if transposed else random_matrix((rows, 30))
    x, y = torch.randn(3, 30, dtype=torch.float64), torch.randn(3, rows, dtype=torch.float64)
    torch.testing.assert_close(times_columns(x, matrix), x @ matrix.T)
    torch.testing.assert_close(times_rows(y, matrix), y @ matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_in_blocks_are_the_plain_products(dtype, monkeypatch):
    monkeypatch.setattr("condft.spectra.operators._CACHED_BYTES", 1000)
    matrix = random_matrix((70, 30)).to(dtype)
    x = torch.randn(2, 30, dtype=torch.float64)
    square = matrix.double().T @ matrix.double()
    torch.testing.assert_close(GramProducts(matrix, torch.float64)(x), x @ square)
    torch.testing.assert_close(SymmetricProducts(square)(x), x @ square)
    blocks = list(iter_row_blocks(matrix, torch.float64, 1000))
    assert len(blocks) > 1
    assert torch.equal(torch.cat([block for _, block in blocks]), matrix.double())


def test_inverses_give_the_smallest_singular_value():
    square = random_matrix((90, 90))
    values = reference(square)
    factors, pivots = torch.linalg.lu_factor(square)
    for inverse in (Inverse(factors, pivots), TriangularInverse(qr_factor(square).mT)):
        ends = BlockLanczos(inverse, block=2).run(lambda ends: ends.largest_error <= 1e-7)
        assert 1.0 / ends.largest == pytest.approx(values[-1], rel=1e-6)


def test_inverses_undo_the_gram_matrix():
    square = random_matrix((20, 20))
    gram = square.T @ square
    vectors = random_matrix((3, 20), 1)
    for inverse in (Inverse(*torch.linalg.lu_factor(square)), TriangularInverse(torch.linalg.cholesky(gram))):
        assert inverse.size == 20
        assert inverse.empty(3).shape == vectors.shape
    torch.testing.assert_close(TriangularInverse(torch.linalg.cholesky(gram))(vectors @ gram), vectors)
    # `Inverse` takes the factors of the transpose where W is stored by rows: (W W^T)^-1 then.
    torch.testing.assert_close(Inverse(*torch.linalg.lu_factor(square.mT))(vectors @ (square @ square.T)), vectors)
