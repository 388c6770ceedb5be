"""`CondFTLayer`: what every wrapper has in common: trainable full-rank copies of a module's weights, per adapter.

A copy, not the weight itself made trainable: a fp32 copy of a bf16 weight keeps updates that bf16 would round away,
the base stays bit for bit as it was (so `disable_adapter` and `unmerge` are exact), and weight decay cannot reach
what is frozen. Of a weight that trains in part (some experts, some heads) only those slices are copied.

How the copies act in the forward is the subclasses' business: `functional`, `substitution` and `experts.layer`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from condft.tuner.layers.dequantize import DequantizingBackend
from condft.tuner.layers.merging import Merging
from condft.tuner.layers.mixed_batch import unreadable
from condft.tuner.layers.offloader import Offloader
from condft.tuner.layers.sharded import is_sharded, on_whole_tensors
from condft.tuner.layers.slices import Slices
from condft.tuner.registration import PREFIX

__all__ = ["CondFTLayer", "Parts"]

Parts = Mapping[str, Slices | None]
"""Name of a parameter in the wrapped module -> which slices of it train; None for all of it."""

_NOT_LENT = ("base_layer", "_hf_hook", "_old_forward")

_PERTURBATION = 0.1  # of the weight's own standard deviation, for init_weights=False


class CondFTLayer(nn.Module, BaseTunerLayer):
    """Wraps one module; its active adapter's copies act in the place of the module's own parameters.

    The copies of the parameter `weight` are in `condft_weight`, one an adapter; those of `out_proj.weight` in
    `condft_out_proj_weight`. Of a parameter that trains in part, the copy holds the slices one after another.

    Args:
        base_layer: The module to wrap.
        adapter_name: Name of the first adapter.
        parts: What of the module that adapter trains.
        init_weights: True copies the base weights, False perturbs the copies.
        inference_mode: True leaves the copies without gradient.
        offload_base: While this adapter acts, the originals of whole parameters are on the CPU.
        dense_dtype: What a quantized weight becomes when it is merged into.
    """

    takes_samples_first = False  # whether forward takes one tensor of samples, so that a batch can be parted

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
        self.adapter_layer_names: tuple[str, ...] = ()
        self.slices: dict[str, dict[str, Slices | None]] = {}  # parameter -> adapter -> slices
        self.merged_adapters: list[str] = []
        self.batch_adapters: frozenset[str] = frozenset()  # while a forward has one for each sample
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.quantization_backend = DequantizingBackend.of(self._base)
        self._dense_dtype = dense_dtype
        self._merging = Merging()
        self._parking = Offloader()
        self._offloading: set[str] = set()  # adapters whose originals are parked while they act
        self.update_layer(
            adapter_name, parts, init_weights=init_weights, inference_mode=inference_mode, offload_base=offload_base
        )

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, it has from the module: callers read `stride`, `num_experts` or `batch_first`.

        But not what accelerate has put there: it would take the module's hooks for the wrapper's.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_LENT:
                raise
            return getattr(self.base_layer, name)

    @property
    def _base(self) -> Any:
        """The wrapped module; Any, since its kind is known at run time only."""
        return self.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """What acts as the module's `weight`, for those who read it past the forward, as Mamba's mixer does."""
        acting = self._acting_attribute("weight")
        return super().weight if acting is None else acting

    @property
    def bias(self) -> Tensor:
        """What acts as the module's `bias`, as `weight`."""
        acting = self._acting_attribute("bias")
        return super().bias if acting is None else acting

    def _acting_attribute(self, parameter: str) -> Tensor | None:
        """None if it is the base layer's own."""
        if parameter == "weight" and self.quantization_backend is not None:
            return None  # who reads that reads codes, and what goes with them
        trained_by = self.slices.get(parameter, {})
        if self.batch_adapters:
            name = f"{parameter} of a {type(self._base).__name__}"
            idle = self.batch_adapters.isdisjoint(trained_by)
            return None if idle else unreadable(self.base_parameter(parameter), name)
        adapter = self._acting()
        return self._acting_tensor(parameter, adapter) if adapter in trained_by else None

    def _acting_tensor(self, parameter: str, adapter: str) -> Tensor:
        """What an adapter puts in the place of a parameter, in that one's dtype."""
        base = self.base_parameter(parameter)
        slices, copy = self.slices[parameter][adapter], self.copies_of(parameter)[adapter].to(base.dtype)
        return copy if slices is None else slices.splice(base.detach(), copy)

    @property
    def in_features(self) -> int | None:
        """What the base layer takes, in PEFT's sense: channels of a convolution, rows of an embedding."""
        return _get_in_out_features(self._base)[0]

    @property
    def out_features(self) -> int | None:
        """What the base layer gives, in PEFT's sense."""
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
        """Adds an adapter: copies of the base values, in their dtype (PEFT then casts half precision to fp32)."""
        for parameter, slices in parts.items():
            if parameter not in self.slices:
                self.slices[parameter] = {}
                setattr(self, _attribute(parameter), nn.ParameterDict({}))
                self.adapter_layer_names = (*self.adapter_layer_names, _attribute(parameter))
            base = self.base_values(parameter).to(self._device_of(parameter))
            copy = base.clone() if slices is None else slices.take(base)
            if not init_weights:
                spread = copy.float().std(correction=0).to(copy.dtype)
                copy += _PERTURBATION * spread * torch.randn_like(copy)
            self.copies_of(parameter)[adapter_name] = nn.Parameter(copy)
            self.slices[parameter][adapter_name] = slices
        if offload_base:
            self._offloading.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def base_parameter(self, parameter: str) -> Any:
        """The wrapped module's own tensor of that name, as it is now (merged, sharded, ...)."""
        owner, _, key = parameter.rpartition(".")
        return getattr(self._base.get_submodule(owner), key)

    def base_values(self, parameter: str) -> Tensor:
        """The values that the module had without any adapter, also while one is merged; dequantized, on any device."""
        return self._merging.base_values(self, parameter)

    def copies_of(self, parameter: str) -> nn.ParameterDict:
        """The trainable copies of one parameter (of its slices), by adapter."""
        copies: nn.ParameterDict = getattr(self, _attribute(parameter))
        return copies

    def parts_of(self, adapter_name: str) -> Iterator[tuple[str, Slices | None, nn.Parameter]]:
        """What an adapter trains here: the parameter's name, its slices (None for all of it), and their copy."""
        for parameter, by_adapter in self.slices.items():
            if adapter_name in by_adapter:
                yield parameter, by_adapter[adapter_name], self.copies_of(parameter)[adapter_name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.settle()

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged and is_sharded(self):
            self.unmerge()  # now: in the forward, as elsewhere, the shards are out of reach
        super().enable_adapters(enabled)
        self.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for by_adapter in self.slices.values():
            by_adapter.pop(adapter_name, None)
        self._offloading.discard(adapter_name)
        self.settle()

    def settle(self, *, unloading: bool = False) -> None:
        """Puts every original where it belongs: on the CPU if its adapter offloads and acts, else on its device."""
        idle: set[str] = set()
        if not (unloading or self.disable_adapters or self.merged):
            for name in self._offloading.intersection(self.active_adapters):
                idle |= {parameter for parameter, slices, _ in self.parts_of(name) if slices is None}
        if self.quantization_backend is not None:
            idle.discard("weight")  # small already, and bound to its device by scales beside it
        self._parking.settle(self._base, idle)

    def away(self) -> list[nn.Parameter]:
        """The base layer's parameters that are parked on another device than the layer's."""
        return self._parking.away(self._base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CondFTLayer":
        """What `to`, `cuda`, `half` and their like come to: parked originals take on the dtype, but do not move."""
        with self._parking.set_aside(self._base, fn):
            super()._apply(fn, recurse)
        return self

    def _device_of(self, parameter: str) -> torch.device:
        return self._parking.home(self._base, parameter)

    def _acting(self) -> str | None:
        """The adapter whose copies act in this forward; None if the base layer acts alone."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if any(True for _ in self.parts_of(name))]
        if len(active) > 1:
            raise ValueError(
                f"the adapters {active} are active together and each has its own copy of this weight: "
                "activate one of them, or merge one first"
            )
        if active:
            self._refuse_offloaded(active[0])
        return active[0] if active else None

    def _refuse_offloaded(self, adapter_name: str) -> None:
        """Accelerate brings a module's tensors back for its forward, and the dictionary of copies has none."""
        for parameter, _, copy in self.parts_of(adapter_name):
            if copy.is_meta and hasattr(self.copies_of(parameter), "_hf_hook"):
                kind = type(self).__name__
                raise ValueError(
                    f"accelerate has offloaded the copies of a {type(self._base).__name__} where its hooks do not "
                    "bring them back: hand preload_module_classes to cpu_offload, disk_offload or dispatch_model, "
                    f"with the class of every wrapper in the model ({kind!r} here), so that it brings each back whole"
                )

    @on_whole_tensors
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapter's copies into the base layer; what they replace is kept for `unmerge`.

        Args:
            safe_merge: Refuse weights with NaN or infinity.
            adapter_names: Adapters to merge, the active ones by default; at most one of them may hold this layer.

        Raises:
            ValueError: More than one adapter for this layer, or non-finite weights under `safe_merge`.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if any(True for _ in self.parts_of(n))]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"cannot merge {names} into a layer that holds {self.merged_adapters or 'no'} merged adapters: "
                "CondFT weights replace the base weight, so one can be merged at a time. Unmerge first."
            )
        parts = list(self.parts_of(names[0]))
        if safe_merge and not all(torch.isfinite(copy).all() for _, _, copy in parts):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        for parameter, slices, copy in parts:
            self._merging.put(
                self, parameter, slices, copy.detach(), parking=self._parking, dense_dtype=self._dense_dtype
            )
        self.merged_adapters.append(names[0])
        self.settle()

    @on_whole_tensors
    def unmerge(self) -> None:
        """Gives the base layer its own weights back, the very same bytes."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._merging.take_back(self, self._parking)
        self.merged_adapters.clear()
        self.settle()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves to the device only. PEFT's own also casts to the base's dtype: fp32 copies would lose their bits."""
        for parameter, _, copy in self.parts_of(adapter_name):
            target = device if device is not None else self._device_of(parameter)
            if not copy.is_meta and target.type != "meta":
                copy.data = copy.data.to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "condft." + super().__repr__()


def _attribute(parameter: str) -> str:
    """The attribute that holds a parameter's copies; its name is what the keys of a saved adapter end in."""
    return PREFIX + parameter.replace(".", "_")
