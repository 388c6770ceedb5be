"""`F.grouped_mm` with a stack of experts of which some are trained copies: two ways to the same product.

The rows come sorted by expert; `offs[e]` is one past the last row of expert e, and rows after the last are nobody's.

| way | where | why |
| --- | --- | --- |
| `expert_by_expert` | on the CPU | torch's own grouped product is a loop there, so nothing has to be gathered |
| `by_gathering` | elsewhere | two grouped products, one of frozen experts' rows, one of trained experts' |
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["by_gathering", "expert_by_expert", "places_of"]

# torch's public function is plain Python around the private one, and older versions have only that.
_product: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@lru_cache(maxsize=1024)
def places_of(trained: tuple[int, ...], num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per expert its place among the trained ones or -1, and the trained ones' indices; on the device."""
    place = torch.full((num_experts + 1,), -1)  # one more, for rows that belong to no expert
    place[list(trained)] = torch.arange(len(trained))
    return place.to(device), torch.tensor(trained, device=device)


def by_gathering(x: Tensor, base: Tensor, values: Tensor, offs: Tensor, trained: tuple[int, ...]) -> Tensor:
    """Rows of frozen and of trained experts apart.

    Args:
        x: `(rows, in_features)`, sorted by expert.
        base: `(experts, in_features, out_features)`, of `x`'s dtype.
        values: `(trained, in_features, out_features)`, of `x`'s dtype.
        offs: `(experts,)`, where each expert's rows end.
        trained: Which experts the values are of, ascending.

    Returns:
        `(rows, out_features)`; rows of no expert are undefined. Without any row of a trained expert, it does not
        depend on `values`.
    """
    place, trained_index = places_of(trained, len(base), x.device)
    sizes = torch.diff(offs, prepend=offs.new_zeros(1))
    ends_of_trained = sizes[trained_index].cumsum(0, dtype=offs.dtype)
    num_rows = int(ends_of_trained[-1])  # the one synchronization
    if num_rows == 0:
        return _product(x, base, offs=offs)
    if num_rows == len(x):
        return _product(x, values, offs=ends_of_trained)
    expert = torch.searchsorted(offs, torch.arange(len(x), device=x.device, dtype=offs.dtype), right=True)
    is_trained = place >= 0
    # A stable sort keeps either part sorted by expert, and rows of no expert at the end of the frozen part.
    order = is_trained[expert].to(torch.uint8).argsort(stable=True)
    of_frozen, of_trained = order[:-num_rows], order[-num_rows:]
    ends_of_frozen = sizes.masked_fill(is_trained[:-1], 0).cumsum(0, dtype=offs.dtype)
    frozen_result = _product(x.index_select(0, of_frozen), base, offs=ends_of_frozen)
    trained_result = _product(x.index_select(0, of_trained), values, offs=ends_of_trained)
    result = torch.empty(len(x), base.shape[-1], dtype=frozen_result.dtype, device=x.device)
    return result.index_copy_(0, of_frozen, frozen_result).index_copy_(0, of_trained, trained_result)


def expert_by_expert(
    x: Tensor, base: Tensor, values: Tensor, offs: Tensor, place: Mapping[int, int], *, is_transposed: bool
) -> Tensor:
    """One product for each expert, of its rows where they lie.

    Args:
        x: `(rows, in_features)`, sorted by expert.
        base: `(experts, in_features, out_features)` of `x`'s dtype, or with the last two swapped; no gradient.
        values: `(trained, ...)` as `base`, in any floating dtype; read as the base's.
        offs: `(experts,)`, where each expert's rows end.
        place: Trained expert -> its index in `values`.
        is_transposed: Whether the stacks' last two dimensions are swapped.

    Returns:
        `(rows, out_features)`, zero in rows of no expert; elsewhere, as its gradients, to the bit what torch's product
        with the stack put together gives. It depends on `values` whatever the rows are.
    """
    result: Tensor = _ExpertByExpert.apply(x, base, values, offs.tolist(), place, is_transposed)
    return result


class _ExpertByExpert(torch.autograd.Function):
    """Of the stack only the trained experts get a gradient, those without a row one of zero.

    Autocast has no part in it, as it has none in torch's grouped product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        values: Tensor,
        ends: Sequence[int],
        place: Mapping[int, int],
        is_transposed: bool,
    ) -> Tensor:
        cast = values.to(base.dtype)
        ctx.save_for_backward(x, base, cast)
        ctx.ends, ctx.place, ctx.is_transposed, ctx.dtype = ends, place, is_transposed, values.dtype
        result = x.new_empty(len(x), base.shape[1 if is_transposed else 2])
        with torch.autocast(x.device.type, enabled=False):
            for expert, start, end in _filled(ends):
                matrix = base[expert] if expert not in place else cast[place[expert]]
                torch.mm(x[start:end], matrix.t() if is_transposed else matrix, out=result[start:end])
        result[ends[-1] :].zero_()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, cast = ctx.saved_tensors
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for_values = cast.new_empty(cast.shape, dtype=ctx.dtype) if ctx.needs_input_grad[2] else None
        missing = set(ctx.place.values())
        with torch.autocast(x.device.type, enabled=False):
            for expert, start, end in _filled(ctx.ends):
                rows, place = grad[start:end], ctx.place.get(expert)
                if for_x is not None:
                    matrix = base[expert] if place is None else cast[place]
                    torch.mm(rows, matrix if ctx.is_transposed else matrix.t(), out=for_x[start:end])
                if for_values is not None and place is not None:
                    left, right = (rows, x[start:end]) if ctx.is_transposed else (x[start:end], rows)
                    missing.discard(place)
                    if for_values.dtype == left.dtype:
                        torch.mm(left.t(), right, out=for_values[place])
                    else:
                        for_values[place].copy_(left.t() @ right)
        if for_x is not None:
            for_x[ctx.ends[-1] :].zero_()
        if for_values is not None:
            for place in missing:
                for_values[place].zero_()
        return for_x, None, for_values, None, None, None


def _filled(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, one past its last row) of the experts that have rows."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
        start = end
