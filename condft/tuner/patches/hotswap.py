"""Lets `peft.utils.hotswap.hotswap_adapter` swap adapters of another method than LoRA.

PEFT's function (0.21) loads an adapter's file and config, then calls `hotswap_adapter_from_state_dict`, which supports
LoRA only: it reads ranks and sets scalings. That second function is replaced by one that chooses by the class of the
config; LoRA adapters are still swapped by PEFT's code.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.utils import PeftType, hotswap
from torch import Tensor, nn

__all__ = ["enable_hotswap"]

_ENABLED = "_condft_enabled"


def enable_hotswap(
    peft_type: PeftType, config_class: type, swap: Callable[[nn.Module, dict[str, Tensor], str, Any], None]
) -> None:
    """Makes `hotswap_adapter` call `swap` for one method's adapters. A second call changes nothing.

    Args:
        peft_type: The method.
        config_class: The class of its configs.
        swap: Called with the model, the file's tensors (the adapter's name is in their keys), the adapter's name and
            the file's config.
    """
    for_lora = hotswap.hotswap_adapter_from_state_dict
    if hasattr(for_lora, _ENABLED):  # by an earlier import: a second wrapper would only add a call
        return

    @wraps(for_lora)
    def by_config(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, **options: Any
    ) -> None:
        if isinstance(config, config_class):
            swap(model, state_dict, adapter_name, config)
        else:
            for_lora(model=model, state_dict=state_dict, adapter_name=adapter_name, config=config, **options)

    setattr(by_config, _ENABLED, True)
    hotswap.hotswap_adapter_from_state_dict = by_config  # type: ignore[assignment]  # also takes LoRA's configs
    hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = []  # PEFT compares none of the config's fields: `swap` does
