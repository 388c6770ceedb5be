"""Loads values into an adapter that a model has already: the file must train the same units of the same base.

An adapter that trains experts or heads keeps their slices one after another. A file of other experts therefore has the
same tensor names and shapes, and only the configs differ. PEFT calls these functions through `patches.load_adapter`
and `patches.hotswap`.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from condft.tuner.config import CondFTConfig
from condft.tuner.loading.base_digests import check_base
from condft.tuner.targets import Targets

__all__ = ["check_load_into", "check_same_units", "swap_adapter"]


def check_same_units(present: CondFTConfig, new: CondFTConfig, adapter_name: str, *, doing: str) -> None:
    """Compares the units that two adapters train.

    Args:
        present: The config of the adapter in the model.
        new: The config of the adapter whose values are to be loaded.
        adapter_name: For the message.
        doing: For the message too, such as `hot-swap`.

    Raises:
        ValueError: Other units or biases. The message has their number and another way to load the adapter.
    """
    # As sets: the order of units does not matter, since slices are stored in ascending order.
    here, there = set(present.target_units or ()), set(new.target_units or ())
    if here != there or present.bias != new.bias:
        raise ValueError(
            f"cannot {doing} {adapter_name!r}: the new adapter trains {len(there - here)} units that the present one "
            f"does not, and lacks {len(here - there)} of its {len(here)} (bias={new.bias!r} instead of "
            f"{present.bias!r}). Load it under another name: model.load_adapter(folder, other_name), "
            "model.set_adapter(other_name), then model.delete_adapter(the present name)."
        )


def check_load_into(model: PeftModel, adapter_name: str, new: CondFTConfig, base_is_checked: bool) -> None:
    """Checks an adapter's config before its values are loaded into an adapter of the model.

    Args:
        model: With the adapter.
        adapter_name: Its name.
        new: The config of the file to load.
        base_is_checked: Whether the base was compared already, or the caller asked not to: `from_pretrained` does so
            when it makes the adapter.

    Raises:
        ValueError: Other units, other biases, or another base model.
    """
    present: Any = model.peft_config[adapter_name]
    check_same_units(present, new, adapter_name, doing="load into")
    if not base_is_checked:
        check_base(Targets(model), new.base_digests or {}, new.base_model_name_or_path)


def swap_adapter(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: CondFTConfig) -> None:
    """Writes an adapter's values into one of the same units. The parameters stay the same objects.

    So a compiled model is not compiled again.

    Args:
        model: The `PeftModel`, compiled or not.
        state_dict: The file's tensors, with the adapter's name in their keys.
        adapter_name: The adapter in the model.
        config: The config of the file.

    Raises:
        ValueError: Other units or biases, another base model, or the adapter is merged.
    """
    adapted: Any = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides the attributes set on a module
    check_same_units(adapted.peft_config[adapter_name], config, adapter_name, doing="hot-swap")
    if any(adapter_name in m.merged_adapters for m in adapted.modules() if isinstance(m, BaseTunerLayer)):
        # The copies would change, but not the merged weights that the model computes with.
        raise ValueError(f"cannot hot-swap {adapter_name!r} while it is merged: call unmerge_adapter() first")
    check_base(Targets(adapted), config.base_digests or {}, config.base_model_name_or_path)
    # PEFT has inserted the adapter's name into the keys, and set_peft_model_state_dict inserts it again.
    ending = f".{adapter_name}"
    plain = {key.removesuffix(ending): value for key, value in state_dict.items()}
    set_peft_model_state_dict(adapted, plain, adapter_name=adapter_name)
