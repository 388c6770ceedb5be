"""`Slices`: the part of a tensor that trains, cut out of it, spliced into it, written over it.

Made of contiguous runs, not of an index tensor: nothing has to follow the model from device to device, and the
gradient of a splice by `torch.cat` is that of the slices alone.
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
        runs: Half-open ranges along it: ascending, apart from each other.
    """

    dim: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def joined(cls, dim: int, ranges: Iterable[tuple[int, int]]) -> "Slices":
        """From half-open ranges in any order; those that touch become one run.

        Raises:
            ValueError: Two of them overlap.
        """
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if runs and start < runs[-1][1]:
                raise ValueError(f"the ranges {runs[-1]} and {(start, stop)} of dimension {dim} overlap")
            if runs and start == runs[-1][1]:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        return cls(dim, tuple(runs))

    @property
    def indices(self) -> tuple[int, ...]:
        """Every index of the slices, ascending."""
        return tuple(index for start, stop in self.runs for index in range(start, stop))

    def take(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """The slices of a tensor, one after another: a new tensor.

        Args:
            tensor: To cut.
            dim: Where to cut it, if not at `self.dim`: the outputs of a layer whose rows these are, say.
        """
        along = self.dim if dim is None else dim
        return torch.cat([tensor.narrow(along, start, stop - start) for start, stop in self.runs], dim=along)

    def splice(self, tensor: Tensor, values: Tensor) -> Tensor:
        """A new tensor: `values`, as `take` gives them, in the place of the slices, and `tensor` everywhere else."""
        pieces: list[Tensor] = []
        done = taken = 0
        for start, stop in self.runs:
            pieces.append(tensor.narrow(self.dim, done, start - done))
            pieces.append(values.narrow(self.dim, taken, stop - start))
            done, taken = stop, taken + stop - start
        pieces.append(tensor.narrow(self.dim, done, tensor.shape[self.dim] - done))
        return torch.cat(pieces, dim=self.dim)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Copies `values`, as `take` gives them, over the slices of a tensor, in place."""
        taken = 0
        for start, stop in self.runs:
            length = stop - start
            tensor.narrow(self.dim, start, length).copy_(values.narrow(self.dim, taken, length))
            taken += length

    def transposed(self) -> "Slices":
        """The same slices of a matrix's transpose."""
        return Slices(1 - self.dim, self.runs)
