"""`ExpertStack`: a fused stack of expert weights of which some train, read as one tensor and never put together.

Put together, the stack would cost a copy of itself a layer, kept for the backward, and a gradient of its full size.
Modules need neither, for they use a stack in one of three ways (transformers' `experts_implementation`):

| use | here |
| --- | --- |
| `stack[expert]`, "eager" | the frozen expert's matrix, or the trained copy |
| `F.grouped_mm(x, stack.transpose(-2, -1), offs=...)`, "grouped_mm" | the rows of trained experts with the copies: `condft.tuner.layers.experts.grouped_product` |
| `stack[experts]`, "batched_mm" | the frozen matrices gathered, the trained ones written over them |

Whatever else is done with the stack, torch's own operations get it put together after all: slower, never wrong.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from condft.tuner.layers.experts.grouped_product import by_gathering, expert_by_expert, places_of
from condft.tuner.layers.slices import Slices

__all__ = ["ExpertStack", "expert_stack"]


class _Parts:
    """The frozen stack and the trained copies, as one forward uses them.

    Attributes:
        base: `(experts, rows, columns)`, frozen.
        values: `(trained, rows, columns)`, in the order of `trained`; its dtype may be a wider one.
        trained: Indices of the trained experts, ascending.
        rows: `values` taken apart, so that each expert's gradient comes by itself.
        is_in_graph: Whether a use has been recorded that gives `values` a whole gradient.
    """

    def __init__(self, base: Tensor, values: Tensor, slices: Slices) -> None:
        self.base, self.values, self.slices = base, values, slices
        self.trained = slices.indices
        self.place = {expert: place for place, expert in enumerate(self.trained)}
        self.rows: tuple[Tensor, ...] = _TakeApart.apply(values)
        self.is_in_graph = False
        self._cast: Tensor | None = None
        self._whole: Tensor | None = None

    def recorded(self) -> None:
        self.is_in_graph |= torch.is_grad_enabled()

    def one(self, expert: int) -> Tensor:
        place = self.place.get(expert % len(self.base) if expert < 0 else expert)
        if place is None:
            return self.base[expert]
        self.recorded()
        return self.rows[place].to(self.base.dtype)

    def cast(self) -> Tensor:
        if self._cast is None:
            self._cast = self.values.to(self.base.dtype)
        return self._cast

    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = self.slices.splice(self.base, self.cast())
        return self._whole

    def gather(self, experts: Tensor) -> Tensor:
        gathered = self.base[experts]
        place, _ = places_of(self.trained, len(self.base), experts.device)
        places = place[experts]
        hit = (places >= 0).nonzero().squeeze(1)
        if not len(hit):
            return gathered
        self.recorded()
        return gathered.index_copy_(0, hit, self.values[places[hit]].to(self.base.dtype))


class ExpertStack(Tensor):
    """A `(experts, rows, columns)` tensor over the frozen stack's memory that reads as if the copies stood in it.

    Made by `expert_stack`. It demands a gradient of its own only to notice one that passes the copies by.
    """

    parts: _Parts
    is_transposed: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        shortcut = _SHORTCUTS.get(func)
        result = NotImplemented if shortcut is None else shortcut(*args, **kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map_only(ExpertStack, ExpertStack.put_together, (args, kwargs))
        return func(*args, **kwargs)

    def put_together(self) -> Tensor:
        """A plain tensor with the copies in place: a copy of the whole stack."""
        return self.oriented(self.parts.whole())

    def oriented(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(-2, -1) if self.is_transposed else tensor


def expert_stack(base: Tensor, values: Tensor, slices: Slices) -> ExpertStack:
    """The stack for one forward.

    Args:
        base: `(experts, rows, columns)`, the frozen stack. Not modified, and not copied.
        values: `(trained, rows, columns)`, the trained copies, in any floating dtype; read as the base's dtype.
        slices: Which experts those are, along dimension 0.
    """
    return _view(_Parts(base.detach(), values, slices), is_transposed=False)


def _view(parts: _Parts, *, is_transposed: bool) -> ExpertStack:
    memory = parts.base.transpose(-2, -1) if is_transposed else parts.base
    watched = torch.is_grad_enabled() and parts.values.requires_grad
    stack: ExpertStack = torch.Tensor._make_subclass(ExpertStack, memory, watched)
    stack.parts, stack.is_transposed = parts, is_transposed
    if watched:
        with torch._C.DisableTorchFunctionSubclass():
            stack.register_hook(_refuse_gradient)
    return stack


def _refuse_gradient(grad: Tensor) -> None:
    raise RuntimeError(
        f"a gradient of shape {tuple(grad.shape)} reached a whole stack of experts and would miss the trained ones: "
        "an operation from outside torch reads the stack directly. Set experts_implementation to 'grouped_mm', "
        "'batched_mm' or 'eager'."
    )


class _TakeApart(torch.autograd.Function):
    """`unbind(0)` that gives experts without any token a gradient of zero, and so always a whole gradient.

    Distributed training needs one on every rank, also where no token went to a trained expert.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = values.new_empty(0).expand(0)
        ctx.shape = values.shape
        return values.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        whole = ctx.like.new_empty(ctx.shape)
        for row, grad in zip(whole, grads, strict=True):
            row.zero_() if grad is None else row.copy_(grad)
        return whole


def _getitem(stack: ExpertStack, index: Any) -> Any:
    if isinstance(index, Tensor):
        if index.dtype.is_floating_point or index.dtype == torch.bool or type(index) is not Tensor:
            return NotImplemented
        if index.ndim == 0:
            return stack.oriented(stack.parts.one(int(index)))
        return stack.oriented(stack.parts.gather(index)) if index.ndim == 1 else NotImplemented
    is_one = isinstance(index, int) and not isinstance(index, bool) and -len(stack.parts.base) <= index
    return stack.oriented(stack.parts.one(index)) if is_one and index < len(stack.parts.base) else NotImplemented


def _transpose(stack: ExpertStack, dim0: int, dim1: int) -> Any:
    if {dim0 % 3, dim1 % 3} != {1, 2}:
        return NotImplemented
    return _view(stack.parts, is_transposed=not stack.is_transposed)


def _grouped_mm(x: Tensor, stack: ExpertStack, *, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows of frozen and of trained experts apart; `offs[e]` is one past the last row of expert e."""
    if (
        any(value is not None for value in options.values())
        or offs is None
        or x.ndim != 2
        or not isinstance(stack, ExpertStack)
    ):
        return NotImplemented
    parts = stack.parts
    if x.device.type == "cpu":
        parts.recorded()
        swapped = stack.is_transposed
        return expert_by_expert(x, parts.base, parts.values, offs, parts.place, is_transposed=swapped)
    return by_gathering(x, stack.oriented(parts.base), stack.oriented(parts.cast()), offs, parts.trained)


_SHORTCUTS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.transpose: _transpose,
    Tensor.mT.__get__: lambda stack: _transpose(stack, -2, -1),  # type: ignore[attr-defined]
}
_SHORTCUTS |= {
    getattr(holder, name): _grouped_mm
    for holder, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(holder, name)
}

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "element_size", "__len__")
}
