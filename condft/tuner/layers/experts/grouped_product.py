"""`F.grouped_mm` with a stack of experts of which some are trained copies, in two ways.

The input's rows are sorted by expert. `offs[e]` is one past the last row of expert e; rows after the last expert's
belong to no expert (they pad the input).

| function | used | how |
| --- | --- | --- |
| `expert_by_expert` | on the CPU | one product per expert, as torch's own grouped product on the CPU |
| `by_gathering` | elsewhere | two grouped products: the rows of frozen experts, the rows of trained experts |
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["by_gathering", "expert_by_expert", "positions_of"]

# Older versions of torch have the private name only; the public function is plain Python that calls it.
_product: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@lru_cache(maxsize=1024)
def positions_of(trained: tuple[int, ...], num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Expert -> its position among the trained ones, or -1; and the indices of the trained ones.

    Cached, because a copy to a GPU at every forward would make the CPU wait.

    >>> positions_of((1, 2), 4, torch.device("cpu"))
    (tensor([-1,  0,  1, -1, -1]), tensor([1, 2]))
    """
    position = torch.full((num_experts + 1,), -1)  # one more, for rows that belong to no expert
    position[list(trained)] = torch.arange(len(trained))
    return position.to(device), torch.tensor(trained, device=device)


def by_gathering(x: Tensor, base: Tensor, values: Tensor, offs: Tensor, trained: tuple[int, ...]) -> Tensor:
    """Two products: the rows of frozen experts with the stack, the rows of trained experts with their copies.

    Args:
        x: `(rows, in_features)`, sorted by expert.
        base: `(experts, in_features, out_features)`, of `x`'s dtype.
        values: `(trained, in_features, out_features)`, of `x`'s dtype.
        offs: `(experts,)`, where each expert's rows end.
        trained: The experts that `values` belong to, ascending.

    Returns:
        `(rows, out_features)`; rows of no expert are undefined. If no row belongs to a trained expert, the result does
        not depend on `values`.
    """
    position, trained_index = positions_of(trained, len(base), x.device)
    sizes = torch.diff(offs, prepend=offs.new_zeros(1))
    ends_of_trained = sizes[trained_index].cumsum(0, dtype=offs.dtype)
    num_rows = int(ends_of_trained[-1])  # the only point where the CPU waits for the device
    if num_rows == 0:  # all rows are of one kind: nothing has to be gathered
        return _product(x, base, offs=offs)
    if num_rows == len(x):
        return _product(x, values, offs=ends_of_trained)
    # right=True, since row offs[e] is the first one of the next expert.
    expert = torch.searchsorted(offs, torch.arange(len(x), device=x.device, dtype=offs.dtype), right=True)
    is_trained = position >= 0
    # A stable sort leaves both parts sorted by expert, and rows of no expert at the end of the frozen part.
    order = is_trained[expert].to(torch.uint8).argsort(stable=True)
    of_frozen, of_trained = order[:-num_rows], order[-num_rows:]
    ends_of_frozen = sizes.masked_fill(is_trained[:-1], 0).cumsum(0, dtype=offs.dtype)
    frozen_result = _product(x.index_select(0, of_frozen), base, offs=ends_of_frozen)
    trained_result = _product(x.index_select(0, of_trained), values, offs=ends_of_trained)
    result = torch.empty(len(x), base.shape[-1], dtype=frozen_result.dtype, device=x.device)
    return result.index_copy_(0, of_frozen, frozen_result).index_copy_(0, of_trained, trained_result)


def expert_by_expert(
    x: Tensor, base: Tensor, values: Tensor, offs: Tensor, position: Mapping[int, int], *, is_transposed: bool
) -> Tensor:
    """One product for each expert, on its rows in place: no rows are gathered.

    Args:
        x: `(rows, in_features)`, sorted by expert.
        base: `(experts, in_features, out_features)` of `x`'s dtype, or with the last two swapped. It gets no gradient.
        values: `(trained, ...)`, otherwise as `base`, in any floating dtype; cast to the base's.
        offs: `(experts,)`, where each expert's rows end.
        position: Trained expert -> its index in `values`.
        is_transposed: Whether the stacks' last two dimensions are swapped.

    Returns:
        `(rows, out_features)`, zero in rows of no expert. Result and gradients are the same bits as those of torch's
        product with the assembled stack. The result always depends on `values`, also if no row uses them.
    """
    result: Tensor = _ExpertByExpert.apply(x, base, values, offs.tolist(), position, is_transposed)
    return result


class _ExpertByExpert(torch.autograd.Function):
    """Only the trained experts get a gradient; it is zero for an expert without rows.

    Autocast is off inside, because torch's grouped product ignores it too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        values: Tensor,
        ends: Sequence[int],
        position: Mapping[int, int],
        is_transposed: bool,
    ) -> Tensor:
        cast = values.to(base.dtype)
        ctx.save_for_backward(x, base, cast)
        ctx.ends, ctx.position, ctx.is_transposed, ctx.dtype = ends, position, is_transposed, values.dtype
        # Each product writes its own rows of it, so nothing is put together afterwards.
        result = x.new_empty(len(x), base.shape[1 if is_transposed else 2])
        with torch.autocast(x.device.type, enabled=False):
            for expert, start, end in _filled(ends):
                matrix = base[expert] if expert not in position else cast[position[expert]]
                torch.mm(x[start:end], matrix.t() if is_transposed else matrix, out=result[start:end])
        result[ends[-1] :].zero_()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, cast = ctx.saved_tensors
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None  # rows of no expert are zeroed below
        for_values = cast.new_empty(cast.shape, dtype=ctx.dtype) if ctx.needs_input_grad[2] else None
        missing = set(ctx.position.values())  # experts without rows: nothing below writes their gradient
        with torch.autocast(x.device.type, enabled=False):
            for expert, start, end in _filled(ctx.ends):
                rows, index = grad[start:end], ctx.position.get(expert)
                if for_x is not None:
                    matrix = base[expert] if index is None else cast[index]
                    torch.mm(rows, matrix if ctx.is_transposed else matrix.t(), out=for_x[start:end])
                if for_values is not None and index is not None:
                    left, right = (rows, x[start:end]) if ctx.is_transposed else (x[start:end], rows)
                    missing.discard(index)
                    if for_values.dtype == left.dtype:
                        torch.mm(left.t(), right, out=for_values[index])
                    else:
                        # torch's product has the input's dtype, so this one too; it is widened after it.
                        for_values[index].copy_(left.t() @ right)
        if for_x is not None:
            for_x[ctx.ends[-1] :].zero_()
        if for_values is not None:
            for index in missing:
                for_values[index].zero_()
        return for_x, None, for_values, None, None, None


def _filled(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, its first row, one past its last row), for each expert that has rows."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
        start = end
