"""`Slices`: the part of a tensor that trains. It is read out of the tensor, put into it, or written over it.

Slices are contiguous runs and not an index tensor. So nothing has to be moved with the model between devices, and
`torch.cat` splices them in, whose gradient reaches the slices alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Slices"]


@dataclass(frozen=True)
class Slices:
    """Runs of indices along one dimension of a tensor.

    Attributes:
        dim: The dimension that is cut.
        runs: Half-open ranges along it, ascending, with a gap between each two.

    >>> heads = Slices.joined(0, [(4, 6), (0, 2)])
    >>> heads.runs, heads.indices
    (((0, 2), (4, 6)), (0, 1, 4, 5))
    >>> weight = torch.arange(6.0)
    >>> heads.take(weight)
    tensor([0., 1., 4., 5.])
    >>> heads.splice(weight, torch.zeros(4))
    tensor([0., 0., 2., 3., 0., 0.])
    """

    dim: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def joined(cls, dim: int, ranges: Iterable[tuple[int, int]]) -> "Slices":
        """Makes slices of half-open ranges in any order; ranges that touch become one run.

        Raises:
            ValueError: Two ranges overlap.
        """
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if runs and start < runs[-1][1]:
                raise ValueError(f"the ranges {runs[-1]} and {(start, stop)} of dimension {dim} overlap")
            if runs and start == runs[-1][1]:
                runs[-1] = (runs[-1][0], stop)  # fewer pieces to splice
            else:
                runs.append((start, stop))
        return cls(dim, tuple(runs))

    @property
    def indices(self) -> tuple[int, ...]:
        """Every index of the slices, ascending."""
        return tuple(index for start, stop in self.runs for index in range(start, stop))

    def take(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """The slices of a tensor, one after another, as a new tensor.

        Args:
            tensor: The tensor to read.
            dim: The dimension to cut, if it is not `self.dim`: in the outputs of a layer, for example, the last
                dimension is the one of the weight's rows.
        """
        along = self.dim if dim is None else dim
        # cat copies a single run too. Callers rely on that: they train the result, or write over the tensor later.
        return torch.cat([tensor.narrow(along, start, stop - start) for start, stop in self.runs], dim=along)

    def splice(self, tensor: Tensor, values: Tensor) -> Tensor:
        """A new tensor with `values` (in the order of `take`) in the slices, and `tensor` everywhere else."""
        pieces: list[Tensor] = []
        done = taken = 0
        for start, stop in self.runs:
            pieces.append(tensor.narrow(self.dim, done, start - done))
            pieces.append(values.narrow(self.dim, taken, stop - start))
            done, taken = stop, taken + stop - start
        pieces.append(tensor.narrow(self.dim, done, tensor.shape[self.dim] - done))
        return torch.cat(pieces, dim=self.dim)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Copies `values` (in the order of `take`) over the slices of a tensor, in place."""
        taken = 0
        for start, stop in self.runs:
            length = stop - start
            tensor.narrow(self.dim, start, length).copy_(values.narrow(self.dim, taken, length))
            taken += length

    def transposed(self) -> "Slices":
        """The same slices of a matrix's transpose."""
        return Slices(1 - self.dim, self.runs)
