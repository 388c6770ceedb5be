"""Modules that read their weights as attributes, run with other tensors in these attributes.

Such are `nn.MultiheadAttention`, fused experts, and layers with a forward of their own. During a forward the adapter's
tensors are in the module's `__dict__`, where Python finds an attribute before `nn.Module.__getattr__` looks among the
registered parameters. The module stays the same object with the same parameters, so hooks, offloading and sharding
work as before; a parametrization would register and remove parameters. As with parametrizations, two threads must not
run one module at the same time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.layers.mixed_batch import mixed_forward

__all__ = ["CustomForwardLayer", "SubstitutingLayer", "has_hooks", "substituted"]

_ABSENT = object()  # not None, which may be an attribute's value


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor | Callable[..., Tensor]]) -> Iterator[None]:
    """In the block, these attributes of a module have these values.

    Args:
        module: Its registered parameters do not change.
        values: Attribute -> value; a path such as `out_proj.weight` is an attribute of a submodule.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with substituted(layer, {"weight": torch.tensor([[1.0, 2.0]])}):
    ...     layer(torch.ones(2))
    tensor([3.])
    """
    places = []
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        # FSDP1 (use_orig_params) keeps its views of flat parameters in `__dict__` too: they are put back afterwards.
        places.append((attributes, key, attributes.get(key, _ABSENT)))
        attributes[key] = value
    try:
        yield
    finally:
        for attributes, key, before in places:
            if before is _ABSENT:
                del attributes[key]
            else:
                attributes[key] = before


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks. Only a call of the module runs them; its functional form does not."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


class SubstitutingLayer(CondFTLayer):
    """Wraps a module whose forward reads its parameters as attributes: it reads the active adapter's copies."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self._adapter_in_effect()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        tensors = {parameter: self._effective_tensor(parameter, adapter) for parameter, _, _ in self.parts_of(adapter)}
        with substituted(self._base, tensors):
            result = self.base_layer(*args, **kwargs)
        return self._connected(result, tensors)

    def _connected(self, result: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The module's result, with the substituted tensors in its autograd graph."""
        return result


class CustomForwardLayer(SubstitutingLayer):
    """Wraps a linear layer, convolution or embedding whose class has a forward of its own.

    Such as a convolution that standardizes its weight first, or an embedding that scales its rows.
    """

    takes_samples_first = True

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        # Numbers and None are the same for every sample; anything else may have a row for each.
        others = (*args[1:], *kwargs.values())
        if not args or not all(value is None or isinstance(value, int | float) for value in others):
            raise TypeError(
                f"a {type(self._base).__name__} supports mixed adapter batches only if its first input is the only "
                "one that has a row for each sample, and it was called with other arguments too. Run the samples of "
                "each adapter as a separate batch, with set_adapter()."
            )
        return mixed_forward(self, *args, adapter_names=adapter_names, **kwargs)
