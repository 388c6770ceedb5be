"""Makes torch's transformer encoder call the wrappers around its weights.

In evaluation `nn.TransformerEncoderLayer` (torch 2.13) passes the weights of `self_attn`, `linear1` and `linear2` to
one fused operation. It reads them as attributes and calls no module's forward, so the copies of an attention's weights
would have no effect, without any error. It does not use that operation if a module inside has a hook.

`nn.TransformerEncoder` does not look for hooks: it turns padded input into a nested tensor, which
`nn.MultiheadAttention` refuses outside of the fused operation if gradients are recorded. So that is turned off too.
"""

from typing import Any

from torch import nn

__all__ = ["disable_encoder_fast_path"]


def disable_encoder_fast_path(model: nn.Module, wrapper_class: type[nn.Module]) -> None:
    """Makes encoder layers call their wrappers, in evaluation too. Further calls change nothing.

    Args:
        model: With its wrappers in place.
        wrapper_class: The class of the wrappers.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Each adapter that is added later comes by here again: one hook for each wrapper is enough.
            for wrapper in module.children():
                if isinstance(wrapper, wrapper_class) and _no_op not in wrapper._forward_pre_hooks.values():
                    wrapper.register_forward_pre_hook(_no_op)
        elif isinstance(module, nn.TransformerEncoder) and any(isinstance(m, wrapper_class) for m in module.modules()):
            module.use_nested_tensor = False


def _no_op(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: torch only asks whether there is one."""
