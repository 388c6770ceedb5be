"""`Merging`: puts an adapter's copies into the module that they act for, and gives it back as it was.

A plain parameter gets the copy's values; a parameter that trains in part only those of its slices. A quantized weight
is not quantized again, since rounding to 4 or 8 bits swallows updates of the size that full-rank training makes: its
layer stands aside for a dense one of the model's dtype, which takes the memory of a dense weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from condft.tuner.layers.dequantize import dense_layer, dense_values
from condft.tuner.layers.offloader import Offloader
from condft.tuner.layers.slices import Slices

__all__ = ["Merging"]


class Merging:
    """What merging has replaced in one module."""

    def __init__(self) -> None:
        self._originals: dict[str, tuple[Slices | None, Tensor]] = {}
        self._quantized: nn.Module | None = None

    def put(
        self,
        layer: Any,
        parameter: str,
        slices: Slices | None,
        copy: Tensor,
        *,
        parking: Offloader,
        dense_dtype: torch.dtype,
    ) -> None:
        """Replaces one parameter of the module, or its slices.

        Args:
            layer: The wrapper; of a quantized weight its `base_layer` is replaced.
            parameter: Name of the parameter in the wrapped module.
            slices: What of it is replaced; None for all of it.
            copy: The values; not modified, and not shared with the module.
            parking: Where the parameter may be parked.
            dense_dtype: For what a quantized weight becomes.
        """
        module = layer.get_base_layer()
        if parameter == "weight" and layer.quantization_backend is not None:
            values = copy if slices is None else slices.splice(dense_values(module, parameter).to(copy), copy)
            self._quantized = module
            layer.base_layer = dense_layer(module, values.to(dense_dtype, copy=True))
        elif slices is None:
            self._originals[parameter] = None, parking.replace(module, parameter, copy)
        else:
            base = layer.base_parameter(parameter).data
            self._originals[parameter] = slices, slices.take(base)
            slices.write(base, copy)

    def take_back(self, layer: Any, parking: Offloader) -> None:
        """The module as it was before, the very same bytes, where the module is by now."""
        if self._quantized is not None:
            dense = layer.get_base_layer()
            device = dense.weight.device
            layer.base_layer = self._quantized.train(dense.training)  # it has not seen what the model was told since
            if self._quantized.weight.device != device:
                self._quantized.to(device)
        for parameter, (slices, original) in self._originals.items():
            if slices is None:
                parking.give_back(layer.get_base_layer(), parameter, original)
            else:
                slices.write(layer.base_parameter(parameter).data, original)
        self._originals.clear()
        self._quantized = None

    def base_values(self, layer: Any, parameter: str) -> Tensor:
        """A parameter's values as they are without any adapter, dequantized."""
        if self._quantized is not None and parameter == "weight":
            return dense_values(self._quantized, parameter)
        values = dense_values(layer.get_base_layer(), parameter)
        if parameter not in self._originals:
            return values
        slices, original = self._originals[parameter]
        original = original.to(values)  # where the module is by now, and in its dtype of now
        return original if slices is None else slices.splice(values, original)
