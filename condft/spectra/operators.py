"""What the Lanczos process needs of a matrix: products with it and with its transpose, in the precision asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Inverse", "MatrixProducts", "Products", "TriangularInverse", "iter_row_blocks"]

_BLOCK_BYTES = 32 * 2**20


class Products(Protocol):
    """A linear map of `size` columns by its two products; vectors are 1-D tensors of `dtype` on `device`."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def apply(self, vector: Tensor) -> Tensor:
        """The map's product with a vector of `size` entries."""

    def apply_transposed(self, vector: Tensor) -> Tensor:
        """The transposed map's product."""


def iter_row_blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The matrix in `dtype`, a `(first row, block of rows)` at a time: one block of extra memory at any height."""
    rows = max(1, _BLOCK_BYTES // (matrix.shape[1] * dtype.itemsize))
    for start in range(0, matrix.shape[0], rows):
        yield start, matrix[start : start + rows].to(dtype)


@dataclass(frozen=True)
class MatrixProducts:
    """A tall matrix `(m, n)`, m >= n, as it is stored; other dtypes are converted block by block at each product."""

    matrix: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def apply(self, vector: Tensor) -> Tensor:
        if self.matrix.dtype == self.dtype:
            return _product(self.matrix, vector)
        return torch.cat([_product(block, vector) for _, block in iter_row_blocks(self.matrix, self.dtype)])

    def apply_transposed(self, vector: Tensor) -> Tensor:
        if self.matrix.dtype == self.dtype:
            return _transposed_product(self.matrix, vector)
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for start, block in iter_row_blocks(self.matrix, self.dtype):
            total += _transposed_product(block, vector[start : start + len(block)])
        return total


# BLAS runs a matrix-vector product in one thread, a batch of them in all: up to twice as fast on two cores. So the
# rows go in as many parts as there are threads. A matrix with fewer entries than this is not worth the splitting.
_SPLIT_FROM = 2**17


def _parts(matrix: Tensor) -> int:
    """Into how many parts the rows go: 1 where they do not split evenly."""
    threads = torch.get_num_threads()
    if matrix.device.type != "cpu" or matrix.numel() < _SPLIT_FROM or matrix.shape[0] % threads:
        return 1
    return threads


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    count = _parts(matrix)
    if count == 1:
        return matrix @ vector
    parts = matrix.unflatten(0, (count, -1))
    return torch.bmm(vector.expand(count, 1, -1), parts.mT).flatten()


def _transposed_product(matrix: Tensor, vector: Tensor) -> Tensor:
    count = _parts(matrix)
    if count == 1:
        return matrix.mT @ vector
    return torch.bmm(vector.view(count, 1, -1), matrix.unflatten(0, (count, -1))).sum(0)[0]


@dataclass(frozen=True)
class Inverse:
    """The inverse of a square matrix by its LU factors (`torch.linalg.lu_factor_ex`)."""

    factors: Tensor
    pivots: Tensor

    @property
    def size(self) -> int:
        return self.factors.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.factors.dtype

    @property
    def device(self) -> torch.device:
        return self.factors.device

    def apply(self, vector: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, vector[:, None])[:, 0]

    def apply_transposed(self, vector: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, vector[:, None], adjoint=True)[:, 0]


@dataclass(frozen=True)
class TriangularInverse:
    """The inverse of a lower triangular matrix."""

    lower: Tensor

    @property
    def size(self) -> int:
        return self.lower.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.lower.dtype

    @property
    def device(self) -> torch.device:
        return self.lower.device

    def apply(self, vector: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower, vector[:, None], upper=False)[:, 0]

    def apply_transposed(self, vector: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower.mT, vector[:, None], upper=True)[:, 0]
