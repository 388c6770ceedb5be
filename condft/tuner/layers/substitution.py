"""Modules that read their weights by attribute (`nn.MultiheadAttention`, fused experts), run with others in place.

For the length of a forward the acting tensors stand in the module's `__dict__`, where attribute access finds them
before `nn.Module.__getattr__` looks among the registered parameters. The module stays the same object with the same
parameters, so hooks, offloading and sharding see what they always saw, and nothing is registered or removed, as a
parametrization would. As with those, two threads must not run one module at the same time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.layers.mixed_batch import mixed_forward

__all__ = ["OwnForwardLayer", "SubstitutingLayer", "has_hooks", "substituted"]

_ABSENT = object()


@contextmanager
def substituted(module: nn.Module, values: Mapping[str, Tensor | Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, the module's attributes of these names (paths such as `out_proj.weight` too) are these values."""
    places = []
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        attributes = module.get_submodule(owner).__dict__
        # FSDP1 puts its views of flat parameters here itself.
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
    """Whether somebody has hung hooks on a module, which only a call of the module itself runs."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


class SubstitutingLayer(CondFTLayer):
    """Wraps a module whose forward reads its parameters as attributes; they read the active adapter's copies."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self._acting()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        acting = {parameter: self._acting_tensor(parameter, adapter) for parameter, _, _ in self.parts_of(adapter)}
        with substituted(self._base, acting):
            result = self.base_layer(*args, **kwargs)
        return self._connected(result, acting)

    def _connected(self, result: Any, acting: Mapping[str, Tensor]) -> Any:
        """The module's result, with what acted in its graph."""
        return result


class OwnForwardLayer(SubstitutingLayer):
    """Wraps a linear layer, convolution or embedding by class that computes something of its own in its forward.

    Such as a convolution that standardizes its weight first, or an embedding that scales what it looks up.
    """

    takes_samples_first = True

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        others = (*args[1:], *kwargs.values())
        if not args or not all(value is None or isinstance(value, int | float) for value in others):
            raise TypeError(
                f"a {type(self._base).__name__} supports mixed adapter batches only where its input is all that tells "
                "the samples apart, and it was called with other arguments too. Run the samples of each adapter as a "
                "batch of their own, with set_adapter()."
            )
        return mixed_forward(self, *args, adapter_names=adapter_names, **kwargs)
