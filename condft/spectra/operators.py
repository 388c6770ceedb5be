r"""Operators for the Lanczos process: $A^T A$ of a matrix, or its inverse, times a few vectors at a time.

Vectors are the rows of a `(b, n)` tensor: each is then contiguous in memory, as the products need it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "GramProducts",
    "Inverse",
    "Symmetric",
    "SymmetricProducts",
    "TriangularInverse",
    "iter_row_blocks",
    "times_columns",
    "times_rows",
]

_BLOCK_BYTES = 32 * 2**20
_CACHED_BYTES = 4 * 2**20  # a block of rows this large is still in the cache when it is read a second time


class Symmetric(Protocol):
    """A symmetric positive semidefinite map of vectors with `size` entries."""

    @property
    def size(self) -> int: ...

    def empty(self, count: int) -> Tensor:
        """An uninitialized `(count, size)` tensor of the map's dtype and device."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """`(b, size)` -> `(b, size)`, a new tensor."""


def iter_row_blocks(matrix: Tensor, dtype: torch.dtype, size: int = _BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
    """The matrix in `dtype`, one `(first row, block of rows)` at a time, so that extra memory is one block.

    It is two blocks if the caller still holds one while it asks for the next: delete the block before.
    """
    rows = max(1, size // (matrix.shape[1] * dtype.itemsize))
    if rows > 2 * _MOST_PARTS:  # a multiple of the number of parts, so that `times_rows` can split every block
        rows -= rows % _MOST_PARTS
    for start in range(0, matrix.shape[0], rows):
        yield start, matrix[start : start + rows].to(dtype)


@dataclass(frozen=True)
class GramProducts:
    r"""$W^T W$ of a tall `(m, n)` matrix, not formed: each block of rows is read once for both products."""

    matrix: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    def empty(self, count: int) -> Tensor:
        return torch.empty(count, self.size, dtype=self.dtype, device=self.matrix.device)

    def __call__(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        size = _CACHED_BYTES if self.matrix.device.type == "cpu" else _BLOCK_BYTES
        for _, block in iter_row_blocks(self.matrix, self.dtype, size):
            total += times_rows(times_columns(vectors, block), block)
            del block  # before the next one is made, see `iter_row_blocks`
        return total


@dataclass(frozen=True)
class SymmetricProducts:
    """A symmetric `(n, n)` matrix with both triangles filled."""

    matrix: Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    def empty(self, count: int) -> Tensor:
        return self.matrix.new_empty(count, self.size)

    def __call__(self, vectors: Tensor) -> Tensor:
        return times_rows(vectors, self.matrix)


# BLAS uses one thread for a product with few vectors, but all threads for a batch of such products: twice as fast on
# two cores. So the rows are split into as many parts as there are threads. Smaller matrices gain nothing by it.
_SPLIT_FROM = 2**17
_MOST_PARTS = 64


def _parts(matrix: Tensor) -> int:
    """The number of parts that the rows are split into: 1 if they do not split evenly."""
    threads = min(torch.get_num_threads(), _MOST_PARTS)
    if matrix.device.type != "cpu" or matrix.numel() < _SPLIT_FROM or matrix.shape[0] % threads:
        return 1
    return threads


def times_rows(vectors: Tensor, matrix: Tensor) -> Tensor:
    """`(b, m)` times `(m, n)` -> `(b, n)`."""
    count = _parts(matrix)
    if count == 1:
        return vectors @ matrix
    parts = vectors.unflatten(1, (count, -1)).transpose(0, 1)
    return torch.bmm(parts, matrix.unflatten(0, (count, -1))).sum(0)


def times_columns(vectors: Tensor, matrix: Tensor) -> Tensor:
    """`(b, n)` times the transpose of `(m, n)` -> `(b, m)`."""
    count = _parts(matrix)
    if count == 1:
        return vectors @ matrix.mT
    parts = torch.bmm(vectors.expand(count, -1, -1), matrix.unflatten(0, (count, -1)).mT)
    return parts.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Inverse:
    r"""$(W^T W)^{-1}$ of a square W by its LU factors (`torch.linalg.lu_factor_ex`)."""

    factors: Tensor
    pivots: Tensor

    @property
    def size(self) -> int:
        return self.factors.shape[0]

    def empty(self, count: int) -> Tensor:
        return self.factors.new_empty(count, self.size)

    def __call__(self, vectors: Tensor) -> Tensor:
        half = torch.linalg.lu_solve(self.factors, self.pivots, vectors.mT, adjoint=True)
        return torch.linalg.lu_solve(self.factors, self.pivots, half).mT


@dataclass(frozen=True)
class TriangularInverse:
    r"""$(L L^T)^{-1}$ of a lower triangular L: of $W^T W$ if L is its Cholesky factor, or $R^T$ of a QR of W."""

    lower: Tensor

    @property
    def size(self) -> int:
        return self.lower.shape[0]

    def empty(self, count: int) -> Tensor:
        return self.lower.new_empty(count, self.size)

    def __call__(self, vectors: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.lower, vectors.mT, upper=False)
        return torch.linalg.solve_triangular(self.lower.mT, half, upper=True).mT
