"""`peft.utils.hotswap.hotswap_adapter` for CondFT: the values of another adapter of the same units, put in place.

PEFT's function loads, then calls a second one that knows LoRA only (it reads ranks and sets scalings). That second
one is put behind a choice by the config's type. The parameters stay the same objects, so a compiled model runs on.
"""

from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap, set_peft_model_state_dict
from torch import Tensor, nn

from condft.tuner.config import CondFTConfig
from condft.tuner.loading.base_digests import check_base
from condft.tuner.loading.existing_adapter import check_same_units
from condft.tuner.registration import add_peft_type
from condft.tuner.targets import Targets

__all__ = ["enable_hotswap"]

_ENABLED = "_condft_enabled"


def enable_hotswap() -> None:
    """Makes PEFT's function take CondFT adapters; does nothing if it does already (a second import)."""
    for_lora = hotswap.hotswap_adapter_from_state_dict
    if hasattr(for_lora, _ENABLED):
        return

    @wraps(for_lora)
    def by_method(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, CondFTConfig):
            _swap(model, state_dict, adapter_name, config)
        else:
            for_lora(model=model, state_dict=state_dict, adapter_name=adapter_name, config=config, **kwargs)

    setattr(by_method, _ENABLED, True)
    hotswap.hotswap_adapter_from_state_dict = by_method  # type: ignore[assignment]  # it takes LoRA's configs too
    hotswap.CONFIG_KEYS_TO_CHECK[add_peft_type()] = []  # what must agree is checked here, in few words


def _swap(model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: CondFTConfig) -> None:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    check_same_units(model.peft_config[adapter_name], config, adapter_name, doing="hot-swap")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(f"cannot hot-swap {adapter_name!r} while it is merged: call unmerge_adapter() first")
    check_base(Targets(model), config.base_digests or {}, config.base_model_name_or_path)
    # PEFT has put the adapter's name into the keys; the usual way to load, with its checks, does so itself.
    ending = f".{adapter_name}"
    plain = {key.removesuffix(ending): value for key, value in state_dict.items()}
    set_peft_model_state_dict(model, plain, adapter_name=adapter_name)
