"""Keeps torch's transformer encoder from reading base weights past their wrappers.

In evaluation without gradients `nn.TransformerEncoderLayer` hands the weights of `self_attn`, `linear1` and `linear2`
to one fused operation, found by attribute: no wrapper's forward is called, and an adapter would silently not act. It
refrains where any module inside has a hook. `nn.TransformerEncoder` does not look for hooks before it turns padded
input into a nested tensor, which only the fused operation can take, so that is turned off too.
"""

from typing import Any

from torch import nn

from condft.tuner.layers.base import CondFTLayer

__all__ = ["keep_off_fast_path"]


def keep_off_fast_path(model: nn.Module) -> None:
    """Makes wrappers in encoder layers run, not just be read. Again and again without further effect.

    Args:
        model: With its wrappers in place.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for wrapper in module.children():
                if isinstance(wrapper, CondFTLayer) and _no_op not in wrapper._forward_pre_hooks.values():
                    wrapper.register_forward_pre_hook(_no_op)
        elif isinstance(module, nn.TransformerEncoder) and any(isinstance(m, CondFTLayer) for m in module.modules()):
            module.use_nested_tensor = False


def _no_op(module: nn.Module, args: Any) -> None:
    """A hook for its presence only."""
