"""`MergedParameters`: writes an adapter's copies into the module that they belong to, and restores the originals.

A plain parameter gets the copy's values; one of which some slices train gets those slices. A quantized weight is not
quantized again: rounding to 4 or 8 bits would remove most of an update, which is small compared with the weight. So
its layer is replaced by a dense one in the model's dtype, which takes the memory of a dense weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from condft.tuner.layers.dequantize import dense_layer, dense_values
from condft.tuner.layers.offloader import Offloader
from condft.tuner.layers.slices import Slices

__all__ = ["MergedParameters"]


class MergedParameters:
    """The originals of what a merge replaced in one module.

    Args:
        offloader: Of the same module: a parameter that is merged may be offloaded.
    """

    def __init__(self, offloader: Offloader) -> None:
        self._offloader = offloader
        self._originals: dict[str, tuple[Slices | None, Tensor]] = {}
        self._quantized: nn.Module | None = None

    def replace(
        self, layer: Any, parameter: str, slices: Slices | None, copy: Tensor, *, dense_dtype: torch.dtype
    ) -> None:
        """Replaces one parameter of the module, or slices of it.

        Args:
            layer: The wrapper. If the weight is quantized, its `base_layer` is replaced.
            parameter: Name of the parameter in the wrapped module.
            slices: Which slices are replaced; None for the whole parameter.
            copy: The new values. They are copied.
            dense_dtype: Of the dense layer that replaces a quantized one.
        """
        module = layer.get_base_layer()
        if parameter == "weight" and layer.quantization_backend is not None:
            values = copy if slices is None else slices.splice(dense_values(module, parameter).to(copy), copy)
            self._quantized = module
            # copy=True: the copy may train on after an unmerge, and must not share memory with the merged layer.
            layer.base_layer = dense_layer(module, values.to(dense_dtype, copy=True))
        elif slices is None:
            self._originals[parameter] = None, self._offloader.replace(module, parameter, copy)
        else:
            base = layer.base_parameter(parameter).data
            self._originals[parameter] = slices, slices.take(base)  # `take` copies, so the next line does not reach it
            slices.write(base, copy)

    def restore(self, layer: Any) -> None:
        """Restores the originals bit for bit, on the module's present device."""
        if self._quantized is not None:
            dense = layer.get_base_layer()
            device = dense.weight.device
            # While it was out of the model, train(), eval() and to() did not reach the quantized layer.
            layer.base_layer = self._quantized.train(dense.training)
            if self._quantized.weight.device != device:
                self._quantized.to(device)
        for parameter, (slices, original) in self._originals.items():
            if slices is None:
                # The base layer is asked for again: it may have changed above.
                self._offloader.restore(layer.get_base_layer(), parameter, original)
            else:
                slices.write(layer.base_parameter(parameter).data, original)
        self._originals.clear()
        self._quantized = None

    def base_values(self, layer: Any, parameter: str) -> Tensor:
        """A parameter's values without any adapter, dequantized."""
        if self._quantized is not None and parameter == "weight":
            return dense_values(self._quantized, parameter)
        values = dense_values(layer.get_base_layer(), parameter)
        if parameter not in self._originals:
            return values
        slices, original = self._originals[parameter]
        original = original.to(values)  # the module may have been moved or cast since the merge
        return original if slices is None else slices.splice(values, original)
