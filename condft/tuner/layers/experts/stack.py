"""`ExpertStack`: a fused stack of expert weights of which some train, read as one tensor but never assembled.

To assemble it would cost a copy of the stack for every layer, kept for the backward, and a gradient of the full size.
Modules do not need that, because they use a stack in one of three ways (transformers' `experts_implementation`):

| implementation | use | answer |
| --- | --- | --- |
| eager | `stack[expert]` | the frozen expert's matrix, or the trained copy |
| grouped_mm | `F.grouped_mm(x, stack.transpose(-2, -1), offs=...)` | see `grouped_product` |
| batched_mm | `stack[experts]` | the frozen matrices gathered, then the trained ones written over them |

For any other operation of torch's the stack is assembled after all: slower, but with the right result.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from condft.tuner.layers.experts.grouped_product import by_gathering, expert_by_expert, positions_of
from condft.tuner.layers.slices import Slices

__all__ = ["ExpertStack", "expert_stack"]


class _Parts:
    """The frozen stack and the trained copies, as one forward uses them.

    Attributes:
        base: `(experts, rows, columns)`, frozen.
        values: `(trained, rows, columns)`, in the order of `trained`; its dtype may be a wider one.
        trained: Indices of the trained experts, ascending.
        position: Trained expert -> its index in `values`.
        matrices: `values` as one tensor per expert, so that each expert gets its gradient separately.
        is_in_graph: Whether autograd has recorded a use that will give `values` a gradient.
    """

    def __init__(self, base: Tensor, values: Tensor, slices: Slices) -> None:
        self.base, self.values, self.slices = base, values, slices
        self.trained = slices.indices
        self.position = {expert: index for index, expert in enumerate(self.trained)}
        self.matrices: tuple[Tensor, ...] = _Unbind.apply(values)
        self.is_in_graph = False
        # Made when they are first needed: which of them depends on how the module uses the stack.
        self._cast: Tensor | None = None
        self._whole: Tensor | None = None

    def note_use(self) -> None:
        self.is_in_graph |= torch.is_grad_enabled()  # without gradients a use leaves no trace in a graph

    def one(self, expert: int) -> Tensor:
        """One expert's matrix, in the base's dtype."""
        # Negative indices count from the end, as in a tensor.
        index = self.position.get(expert % len(self.base) if expert < 0 else expert)
        if index is None:
            return self.base[expert]
        self.note_use()
        return self.matrices[index].to(self.base.dtype)

    def cast(self) -> Tensor:
        """The copies in the base's dtype, cast once in a forward."""
        if self._cast is None:
            self._cast = self.values.to(self.base.dtype)
        return self._cast

    def whole(self) -> Tensor:
        """A plain tensor of the whole stack with the copies in it, assembled once in a forward."""
        if self._whole is None:
            self._whole = self.slices.splice(self.base, self.cast())
        return self._whole

    def gather(self, experts: Tensor) -> Tensor:
        """The matrices of these experts, `(len(experts), rows, columns)`, in the base's dtype."""
        gathered = self.base[experts]
        position, _ = positions_of(self.trained, len(self.base), experts.device)
        positions = position[experts]
        hit = (positions >= 0).nonzero().squeeze(1)
        if not len(hit):
            return gathered
        self.note_use()
        # In place: indexing by a tensor has made a new tensor, not a view of the frozen stack.
        return gathered.index_copy_(0, hit, self.values[positions[hit]].to(self.base.dtype))


class ExpertStack(Tensor):
    """A `(experts, rows, columns)` tensor on the frozen stack's memory that reads as if it contained the copies.

    Made by `expert_stack`. It requires a gradient only to notice one that would miss the copies; see `_view`.
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
        args, kwargs = tree_map_only(ExpertStack, ExpertStack.assembled, (args, kwargs))
        return func(*args, **kwargs)

    def assembled(self) -> Tensor:
        """A plain tensor with the copies in it: a copy of the whole stack."""
        return self.oriented(self.parts.whole())

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor of the parts, transposed if the stack is."""
        return tensor.transpose(-2, -1) if self.is_transposed else tensor


def expert_stack(base: Tensor, values: Tensor, slices: Slices) -> ExpertStack:
    """The stack for one forward.

    Args:
        base: `(experts, rows, columns)`, the frozen stack. It is neither changed nor copied.
        values: `(trained, rows, columns)`, the trained copies, in any floating dtype; cast to the base's.
        slices: Which experts the copies belong to, along dimension 0.

    >>> frozen, copies = torch.zeros(4, 2, 2), torch.ones(1, 2, 2)
    >>> stack = expert_stack(frozen, copies, Slices(0, ((3, 4),)))
    >>> stack.shape, stack[3].sum(), stack[0].sum()
    (torch.Size([4, 2, 2]), tensor(4.), tensor(0.))
    """
    # Detached: the frozen experts get no gradient.
    return _view(_Parts(base.detach(), values, slices), is_transposed=False)


def _view(parts: _Parts, *, is_transposed: bool) -> ExpertStack:
    memory = parts.base.transpose(-2, -1) if is_transposed else parts.base
    watched = torch.is_grad_enabled() and parts.values.requires_grad
    stack: ExpertStack = torch.Tensor._make_subclass(ExpertStack, memory, watched)
    stack.parts, stack.is_transposed = parts, is_transposed
    if watched:
        # An operation from outside torch reads the memory directly, and its gradient would arrive here.
        with torch._C.DisableTorchFunctionSubclass():
            stack.register_hook(_refuse_gradient)
    return stack


def _refuse_gradient(grad: Tensor) -> None:
    raise RuntimeError(
        f"a gradient of shape {tuple(grad.shape)} reached a whole stack of experts and would miss the trained ones: "
        "an operation from outside torch reads the stack directly. Set experts_implementation to 'grouped_mm', "
        "'batched_mm' or 'eager'."
    )


class _Unbind(torch.autograd.Function):
    """`unbind(0)` whose gradient is always complete: zero for experts that no token was routed to.

    DDP and FSDP wait for the gradient of every parameter in every process, also where no token uses a trained expert.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, ...]:
        # None for an expert that was not used, instead of zeros that would only be copied.
        ctx.set_materialize_grads(False)
        ctx.like = values.new_empty(0)  # for device and dtype, without keeping the values
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
        # bool is a mask and no list of experts. Such rare ways of indexing get the assembled stack.
        if index.dtype.is_floating_point or index.dtype == torch.bool or type(index) is not Tensor:
            return NotImplemented
        if index.ndim == 0:
            return stack.oriented(stack.parts.one(int(index)))
        return stack.oriented(stack.parts.gather(index)) if index.ndim == 1 else NotImplemented
    # A bool is an int in Python, but as an index it adds a dimension.
    is_one = isinstance(index, int) and not isinstance(index, bool) and -len(stack.parts.base) <= index
    return stack.oriented(stack.parts.one(index)) if is_one and index < len(stack.parts.base) else NotImplemented


def _transpose(stack: ExpertStack, dim0: int, dim1: int) -> Any:
    if {dim0 % 3, dim1 % 3} != {1, 2}:  # dimensions may be negative
        return NotImplemented
    return _view(stack.parts, is_transposed=not stack.is_transposed)


def _grouped_mm(x: Tensor, stack: ExpertStack, *, offs: Tensor | None = None, **options: Any) -> Any:
    """Uses the copies for the rows of trained experts; `offs[e]` is one past the last row of expert e."""
    if (
        any(value is not None for value in options.values())  # a bias or another dtype of the output
        or offs is None
        or x.ndim != 2
        or not isinstance(stack, ExpertStack)  # then x is the stack
    ):
        return NotImplemented
    parts = stack.parts
    if x.device.type == "cpu":
        parts.note_use()
        swapped = stack.is_transposed
        return expert_by_expert(x, parts.base, parts.values, offs, parts.position, is_transposed=swapped)
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

# They do not depend on values, so the memory of the frozen stack answers them.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "stride", "numel", "is_contiguous", "is_floating_point", "element_size", "__len__")
}
