"""Keeps torch's transformer encoder from reading base weights past their wrappers.

In evaluation without gradients `nn.TransformerEncoderLayer` hands the weights of `self_attn`, `linear1` and `linear2`
to one fused operation, found by attribute: no wrapper's forward is called, and an adapter would silently not act. It
refrains where any module inside has a hook.
"""

from typing import Any

from torch import nn

__all__ = ["keep_off_fast_path"]


def keep_off_fast_path(parent: nn.Module, layer: nn.Module) -> None:
    """Makes a wrapper in an encoder layer run, not just be read.

    Args:
        parent: The module that the wrapper stands in.
        layer: The wrapper.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer.register_forward_pre_hook(_no_op)


def _no_op(module: nn.Module, args: Any) -> None:
    """A hook for its presence only."""
