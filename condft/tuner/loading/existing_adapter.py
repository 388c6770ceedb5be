"""What is loaded into an adapter that a model has already must be of the same units, and of the same base.

Copies of experts or heads are slices one after another, so a file of other experts has the very names and shapes of
this adapter's. Only its config tells, and PEFT reads none for `model.load_adapter(folder, name)` where `name` is there
already. So that method is put behind a look at `adapter_config.json`, for CondFT adapters only.
"""

from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from condft.tuner.config import CondFTConfig
from condft.tuner.loading.base_digests import check_base
from condft.tuner.targets import Targets

__all__ = ["check_existing_adapters", "check_same_units"]

_CHECKED = "_condft_checked"


def check_same_units(present: CondFTConfig, new: CondFTConfig, adapter_name: str, *, doing: str) -> None:
    """Compares what two adapters train.

    Args:
        present: The config of the adapter in the model.
        new: The config of the one whose values are to take its place.
        adapter_name: For the message.
        doing: For the message too, such as `hot-swap`.

    Raises:
        ValueError: Other units or biases: says how many, and the way out.
    """
    here, there = set(present.target_units or ()), set(new.target_units or ())
    if here != there or present.bias != new.bias:
        raise ValueError(
            f"cannot {doing} {adapter_name!r}: the new adapter trains {len(there - here)} units that this one does "
            f"not, and lacks {len(here - there)} of its {len(here)} (bias={new.bias!r} there, {present.bias!r} "
            "here). Load it beside this one: model.load_adapter(folder, another name), model.set_adapter(that name), "
            "then model.delete_adapter(the old name)."
        )


def check_existing_adapters() -> None:
    """Makes `PeftModel.load_adapter` check; does nothing if it does already (a second import).

    `PeftModel.from_pretrained` comes by it too, after it has made the adapter: a config that was handed over is
    compared with the folder's. Nothing is compared where a `key_mapping` renames what is loaded, nor where a local
    folder holds no config.
    """
    load_adapter = PeftModel.load_adapter
    if hasattr(load_adapter, _CHECKED):
        return

    @wraps(load_adapter)
    def checked(self: PeftModel, model_id: str | PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        present, key_mapping = self.peft_config.get(adapter_name), kwargs.get("key_mapping")
        if isinstance(present, CondFTConfig) and not key_mapping:
            hub_options, _ = self._split_kwargs(kwargs)
            new = _config_of(model_id, hub_options)
            if isinstance(new, CondFTConfig):  # the tensors of another method are foreign ones, and refused as such
                check_same_units(present, new, adapter_name, doing="load into")
                # from_pretrained, which hands over {}, has checked the base already, or was told not to.
                if key_mapping is None:
                    check_base(Targets(self), new.base_digests or {}, new.base_model_name_or_path)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    setattr(checked, _CHECKED, True)
    PeftModel.load_adapter = checked  # type: ignore[method-assign]


def _config_of(model_id: str | PathLike[str], hub_options: dict[str, Any]) -> Any:
    folder = Path(model_id)
    if folder.is_dir() and not (folder / (hub_options.get("subfolder") or "") / CONFIG_NAME).is_file():
        return None
    return CondFTConfig.from_pretrained(str(model_id), **hub_options)
