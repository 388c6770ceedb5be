"""`CondFTLayer`: what all wrappers have in common, trainable full-rank copies of a module's weights for each adapter.

Why copies, and not the weights themselves made trainable:

- A small step is lost when it is added to a bf16 weight. An fp32 copy keeps it.
- The base stays the same bit for bit, so `disable_adapter` and `unmerge` are exact.
- Weight decay cannot change a weight that is frozen.

Of a weight that trains in part (some experts, some heads), only those slices are copied. How a forward uses the copies
depends on the kind of module: see `functional`, `substitution` and `experts.layer`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from condft.tuner.layers.dequantize import DequantizingBackend
from condft.tuner.layers.merging import MergedParameters
from condft.tuner.layers.mixed_batch import metadata_only
from condft.tuner.layers.offloader import Offloader
from condft.tuner.layers.sharded import is_sharded, on_whole_tensors
from condft.tuner.layers.slices import Slices
from condft.tuner.registration import PREFIX

__all__ = ["CondFTLayer", "Parts"]

Parts = Mapping[str, Slices | None]
"""Name of a parameter in the wrapped module -> which slices of it train; None if all of it trains."""

# Attributes of the wrapped module that the wrapper does not show as its own: its child, and accelerate's hook.
# `base_layer` must not be looked up in itself: that would never end. With the layer's hook, accelerate would skip
# the wrapper's forward.
_NOT_FORWARDED = ("base_layer", "_hf_hook", "_old_forward")

_PERTURBATION = 0.1  # of the weight's own standard deviation, for init_weights=False


class CondFTLayer(nn.Module, BaseTunerLayer):
    """Wraps one module. The active adapter's copies replace the module's own parameters in the forward.

    The copies of the parameter `weight` are in `condft_weight`, one for each adapter; those of `out_proj.weight` in
    `condft_out_proj_weight`. If a parameter trains in part, its copy holds the slices one after another.

    Args:
        base_layer: The module to wrap.
        adapter_name: Name of the first adapter.
        parts: The parameters of the module that this adapter trains, and which slices of them.
        init_weights: True copies the base weights, False adds noise to the copies.
        inference_mode: True makes copies that need no gradient.
        offload_base: While this adapter is active, the originals of whole parameters are on the CPU.
        dense_dtype: Dtype of a quantized weight after a merge.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig
    >>> model = get_peft_model(base, CondFTConfig(target_units=["model.layers.0.mlp.up_proj.weight"]))
    >>> layer = model.base_model.model.model.layers[0].mlp.up_proj
    >>> isinstance(layer, CondFTLayer)
    True
    >>> [(name, slices, tuple(copy.shape)) for name, slices, copy in layer.parts_of("default")]
    [('weight', None, (64, 32))]
    >>> layer.get_base_layer()
    Linear(in_features=32, out_features=64, bias=False)
    """

    takes_samples_first = False  # whether the forward takes one tensor of samples, so that a batch can be divided

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parts: Parts,
        *,
        init_weights: bool = True,
        inference_mode: bool = False,
        offload_base: bool = False,
        dense_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # PEFT's name for the attributes with an adapter's parameters. Not of the class: each module has others.
        self.adapter_layer_names: tuple[str, ...] = ()
        self.slices: dict[str, dict[str, Slices | None]] = {}  # parameter -> adapter -> slices
        self.merged_adapters: list[str] = []
        self.batch_adapters: frozenset[str] = frozenset()  # the adapters of a forward that has one for each sample
        self._disable_adapters = False
        self._active_adapter = adapter_name  # update_layer, below, trains the active adapter's copies only
        self.quantization_backend = DequantizingBackend.of(self._base)
        self._dense_dtype = dense_dtype
        self._offloader = Offloader()
        self._merged_parameters = MergedParameters(self._offloader)
        self._offloading_adapters: set[str] = set()  # their originals are on the CPU while they are active
        self.update_layer(
            adapter_name, parts, init_weights=init_weights, inference_mode=inference_mode, offload_base=offload_base
        )

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the module's: callers read `stride`, `num_experts`, `batch_first`.

        Accelerate's hook is an exception: accelerate would use the module's hook as the wrapper's.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_FORWARDED:
                raise
            return getattr(self.base_layer, name)

    @property
    def _base(self) -> Any:
        """The wrapped module; Any, because its class is known at run time only."""
        return self.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The weight in effect, for code that reads it without calling the forward, such as Mamba's mixer."""
        effective = self._effective_attribute("weight")
        return super().weight if effective is None else effective

    @property
    def bias(self) -> Tensor:
        """The bias in effect; see `weight`."""
        effective = self._effective_attribute("bias")
        return super().bias if effective is None else effective

    def _effective_attribute(self, parameter: str) -> Tensor | None:
        """None if the base layer's own is in effect."""
        if parameter == "weight" and self.quantization_backend is not None:
            return None  # code that reads a quantized weight expects its packed bits and its scales
        trained_by = self.slices.get(parameter, {})
        # Each sample has its own adapter, so no single tensor is in effect. Shape and dtype are still asked for.
        if self.batch_adapters:
            name = f"{parameter} of a {type(self._base).__name__}"
            idle = self.batch_adapters.isdisjoint(trained_by)
            return None if idle else metadata_only(self.base_parameter(parameter), name)
        adapter = self._adapter_in_effect()
        return self._effective_tensor(parameter, adapter) if adapter in trained_by else None

    def _effective_tensor(self, parameter: str, adapter: str) -> Tensor:
        """The tensor that replaces a parameter while an adapter is in effect, in that parameter's dtype."""
        base = self.base_parameter(parameter)
        slices, copy = self.slices[parameter][adapter], self.copies_of(parameter)[adapter].to(base.dtype)
        return copy if slices is None else slices.splice(base.detach(), copy)

    @property
    def in_features(self) -> int | None:
        """Inputs of the base layer as PEFT counts them: channels of a convolution, rows of an embedding."""
        return _get_in_out_features(self._base)[0]

    @property
    def out_features(self) -> int | None:
        """Outputs of the base layer as PEFT counts them."""
        return _get_in_out_features(self._base)[1]

    def update_layer(
        self,
        adapter_name: str,
        parts: Parts,
        *,
        init_weights: bool = True,
        inference_mode: bool = False,
        offload_base: bool = False,
    ) -> None:
        """Adds an adapter: copies of the base values, in their dtype. PEFT then casts half precision to fp32."""
        for parameter, slices in parts.items():
            if parameter not in self.slices:
                self.slices[parameter] = {}
                setattr(self, _attribute(parameter), nn.ParameterDict({}))
                self.adapter_layer_names = (*self.adapter_layer_names, _attribute(parameter))
            base = self.base_values(parameter).to(self._device_of(parameter))
            # The base must keep its bits while the copy trains; `take` makes a new tensor by itself.
            copy = base.clone() if slices is None else slices.take(base)
            if not init_weights:
                # Without a correction, which gives NaN for a parameter of one entry.
                spread = copy.float().std(correction=0).to(copy.dtype)
                copy += _PERTURBATION * spread * torch.randn_like(copy)
            self.copies_of(parameter)[adapter_name] = nn.Parameter(copy)
            self.slices[parameter][adapter_name] = slices
        if offload_base:
            self._offloading_adapters.add(adapter_name)
        # Decides for the new copies too which require a gradient, and which originals are offloaded.
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def base_parameter(self, parameter: str) -> Any:
        """The wrapped module's own tensor with that name, in its present state (merged, sharded, offloaded)."""
        owner, _, key = parameter.rpartition(".")
        return getattr(self._base.get_submodule(owner), key)

    def base_values(self, parameter: str) -> Tensor:
        """A parameter's values without any adapter, dequantized, on any device. While an adapter is merged too."""
        return self._merged_parameters.base_values(self, parameter)

    def copies_of(self, parameter: str) -> nn.ParameterDict:
        """Adapter -> its trainable copy of one parameter, or of the parameter's slices."""
        copies: nn.ParameterDict = getattr(self, _attribute(parameter))
        return copies

    def parts_of(self, adapter_name: str) -> Iterator[tuple[str, Slices | None, nn.Parameter]]:
        """The parts of this module that an adapter trains: parameter name, slices (None for all of it), and copy."""
        for parameter, by_adapter in self.slices.items():
            if adapter_name in by_adapter:
                yield parameter, by_adapter[adapter_name], self.copies_of(parameter)[adapter_name]

    def trains(self, adapter_name: str) -> bool:
        """Whether an adapter trains a part of this module."""
        return any(adapter_name in by_adapter for by_adapter in self.slices.values())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.update_offloading()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged and is_sharded(self):
            # At once, and not in the next forward as elsewhere: inside a forward the shards cannot be written.
            self.unmerge()
        super().enable_adapters(enabled)
        self.update_offloading()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # PEFT's own knows the parameters only
        for by_adapter in self.slices.values():
            by_adapter.pop(adapter_name, None)
        self._offloading_adapters.discard(adapter_name)
        self.update_offloading()

    def update_offloading(self, *, unloading: bool = False) -> None:
        """Moves each original to the CPU if an active adapter offloads it, and back to its device if none does.

        Args:
            unloading: True restores all of them, before the wrapper is removed.
        """
        unused: set[str] = set()
        if not (unloading or self.disable_adapters or self.merged):
            for name in self._offloading_adapters.intersection(self.active_adapters):
                unused |= {parameter for parameter, slices, _ in self.parts_of(name) if slices is None}
        if self.quantization_backend is not None:
            unused.discard("weight")  # it is small, and its scales are attributes that would stay on the device
        self._offloader.offload_only(self._base, unused)

    def offloaded_parameters(self) -> list[nn.Parameter]:
        """The base layer's parameters that are on another device than the layer's."""
        return self._offloader.offloaded(self._base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CondFTLayer":
        """Called by `to`, `cuda`, `half` and the like. Offloaded originals change their dtype, but do not move."""
        with self._offloader.without_offloaded(self._base, fn):
            super()._apply(fn, recurse)
        return self

    def _device_of(self, parameter: str) -> torch.device:
        return self._offloader.device_of(self._base, parameter)

    def _adapter_in_effect(self) -> str | None:
        """The adapter whose copies this forward uses; None if it uses the base layer as it is."""
        # For good, as in PEFT's layers: the adapter is not merged again when it is enabled.
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:  # merged, the base layer holds the adapter's values
            return None
        # Several adapters may be active in a model, as long as each module is trained by one of them at most.
        active = [name for name in self.active_adapters if self.trains(name)]
        if len(active) > 1:
            raise ValueError(
                f"the adapters {active} are active together and each has its own copy of this weight: "
                "activate one of them, or merge one first"
            )
        if active:
            self._refuse_offloaded(active[0])
        return active[0] if active else None

    def _refuse_offloaded(self, adapter_name: str) -> None:
        """accelerate (1.15) loads a module's tensors for that module's forward; a `ParameterDict` has no forward."""
        for parameter, _, copy in self.parts_of(adapter_name):
            if copy.is_meta and hasattr(self.copies_of(parameter), "_hf_hook"):
                kind = type(self).__name__
                raise ValueError(
                    f"accelerate has offloaded the copies of a {type(self._base).__name__} in a way that its hooks do "
                    "not undo: pass preload_module_classes to cpu_offload, disk_offload or dispatch_model, with the "
                    f"class of every wrapper in the model ({kind!r} here), so that each wrapper is loaded as a whole"
                )

    @on_whole_tensors
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapter's copies into the base layer. The originals are kept for `unmerge`.

        Args:
            safe_merge: Refuse weights with NaN or infinity.
            adapter_names: Adapters to merge, by default the active ones. At most one of them may train this module.

        Raises:
            ValueError: More than one adapter for this layer, or non-finite weights under `safe_merge`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.trains(name)]
        if not names:  # an adapter need not train every wrapped module
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"cannot merge {names} into a layer that holds {self.merged_adapters or 'no'} merged adapters: "
                "CondFT weights replace the base weight, so one can be merged at a time. Unmerge first."
            )
        parts = list(self.parts_of(names[0]))
        # Before the first write, so that a refused merge changes nothing. The message is PEFT's.
        if safe_merge and not all(torch.isfinite(copy).all() for _, _, copy in parts):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        for parameter, slices, copy in parts:
            self._merged_parameters.replace(self, parameter, slices, copy.detach(), dense_dtype=self._dense_dtype)
        self.merged_adapters.append(names[0])  # before update_offloading, which asks whether the layer is merged
        self.update_offloading()

    @on_whole_tensors
    def unmerge(self) -> None:
        """Restores the base layer's own weights bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._merged_parameters.restore(self)
        self.merged_adapters.clear()
        self.update_offloading()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the copies to a device. PEFT's method also casts to the base's dtype: fp32 copies would lose bits."""
        for parameter, _, copy in self.parts_of(adapter_name):
            target = device if device is not None else self._device_of(parameter)
            if not copy.is_meta and target.type != "meta":
                copy.data = copy.data.to(target)  # `.data`: an optimizer may hold the parameter

    # For PEFT's convert_to_lora, which needs additive updates. `export_lora` makes one of the difference.
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "condft." + super().__repr__()


def _attribute(parameter: str) -> str:
    """The attribute that holds a parameter's copies. The keys of a saved adapter end with it."""
    return PREFIX + parameter.replace(".", "_")
