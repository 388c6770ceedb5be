"""`CondFTLayer`: one wrapper a selected layer, holding a trainable full-rank copy of its weight per adapter.

A copy, not the weight itself made trainable: a fp32 copy of a bf16 weight keeps updates that bf16 would round away,
the base stays bit for bit as it was (so `disable_adapter` and `unmerge` are exact), and weight decay cannot reach
what is frozen. The forward calls the functional form of each layer kind: `functional_call` would be silently wrong
under FSDP1 with `use_orig_params`.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["SUPPORTED_LAYERS", "CondFTLayer"]

SUPPORTED_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_PERTURBATION = 0.1  # of the weight's own standard deviation, for init_weights=False


class CondFTLayer(nn.Module, BaseTunerLayer):
    """Wraps one layer; its active adapter's copy of the weight acts in the place of the base weight.

    Args:
        base_layer: The layer to wrap, of one of `SUPPORTED_LAYERS`.
        adapter_name: Name of the first adapter.
        init_weights: True copies the base weight, False perturbs the copy.
        inference_mode: True leaves the copy without gradient.

    Raises:
        TypeError: A layer of another kind.
    """

    adapter_layer_names = ("condft_weight",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, init_weights: bool = True, inference_mode: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, SUPPORTED_LAYERS):
            kinds = ", ".join(kind.__name__ for kind in SUPPORTED_LAYERS)
            raise TypeError(f"CondFT cannot train a {type(base_layer).__name__}: it supports {kinds}")
        self.base_layer = base_layer
        self.condft_weight = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._unmerged_weight: Tensor | None = None  # the base weight's own memory while an adapter is merged
        self.update_layer(adapter_name, init_weights=init_weights, inference_mode=inference_mode)

    @property
    def _base(self) -> Any:
        """The base layer; Any, since its kind is known at run time only."""
        return self.get_base_layer()

    def update_layer(self, adapter_name: str, *, init_weights: bool = True, inference_mode: bool = False) -> None:
        """Adds an adapter: a copy of the base weight, in its dtype (PEFT then casts half precision to fp32)."""
        base = self._unmerged_weight if self._unmerged_weight is not None else self._base.weight
        copy = base.detach().clone()
        if not init_weights:
            copy += _PERTURBATION * copy.float().std().to(copy.dtype) * torch.randn_like(copy)
        self.condft_weight[adapter_name] = nn.Parameter(copy)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._active_here()
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self._functional(x, self.condft_weight[active[0]])

    def _active_here(self) -> list[str]:
        active = [name for name in self.active_adapters if name in self.condft_weight]
        if len(active) > 1:
            raise ValueError(
                f"the adapters {active} are active together and each has its own copy of this weight: "
                "activate one of them, or merge one first"
            )
        return active

    def _functional(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base layer's function with another weight, computed in the base layer's dtype."""
        base = self._base
        if isinstance(base, nn.Embedding):
            return self._embed(x, weight.to(base.weight.dtype))
        x = self._cast_input_dtype(x, base.weight.dtype)
        # Under autocast the copy goes in as it is: autocast casts it itself, once a step, and caches that.
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        if isinstance(base, nn.Linear):
            return F.linear(x, weight, base.bias)
        if isinstance(base, Conv1D):
            flat = torch.addmm(base.bias, x.reshape(-1, x.shape[-1]), weight)
            return flat.reshape(*x.shape[:-1], base.nf)
        return base._conv_forward(x, weight, base.bias)

    def _embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        base = self._base
        embedded = F.embedding(
            ids, weight, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        )
        scale = self._get_embed_scale()  # some embeddings multiply by a constant in their forward (Gemma 3)
        return embedded if scale is None else embedded * scale.to(embedded.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapter's weight into the base layer; the base weight's memory is kept for `unmerge`.

        Args:
            safe_merge: Refuse weights with NaN or infinity.
            adapter_names: Adapters to merge, the active ones by default; at most one of them may hold this layer.

        Raises:
            ValueError: More than one adapter for this layer, or non-finite weights under `safe_merge`.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.condft_weight]
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(
                f"cannot merge {names} into a layer that holds {self.merged_adapters or 'no'} merged adapters: "
                "CondFT weights replace the base weight, so one can be merged at a time. Unmerge first."
            )
        base = self._base
        merged = self.condft_weight[names[0]].detach().to(base.weight.dtype, copy=True)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaN or infinity in the merged weights: the adapter {names[0]} seems to be broken")
        self._unmerged_weight = base.weight.data
        base.weight.data = merged
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Gives the base layer its own weight back, the very same bytes."""
        if not self.merged or self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self._base
        base.weight.data = self._unmerged_weight.to(base.weight.device)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves to the device only. PEFT's own also casts to the base's dtype: fp32 copies would lose their bits."""
        if adapter_name in self.condft_weight:
            target = device if device is not None else self._base.weight.device
            copy = self.condft_weight[adapter_name]
            if not copy.is_meta and target.type != "meta":
                copy.data = copy.data.to(target)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "condft." + super().__repr__()
