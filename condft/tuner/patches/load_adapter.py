"""Checks an adapter's folder before `PeftModel.load_adapter` writes its values into an adapter that exists already.

For `model.load_adapter(folder, name)` PEFT (0.21) reads the folder's config only if the model has no adapter of that
name. Otherwise it compares nothing but names and shapes of tensors. That is not enough where an adapter trains some
experts or heads: their copies are stored one after another, so a file of other experts has the same names and shapes.
"""

from collections.abc import Callable
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

__all__ = ["check_before_loading"]

_CHECKED = "_condft_checked"


def check_before_loading(config_class: type[PeftConfig], check: Callable[[PeftModel, str, Any, bool], None]) -> None:
    """Makes `PeftModel.load_adapter` call `check` first where the model has the adapter already.

    A second call changes nothing.

    `PeftModel.from_pretrained` calls `load_adapter` too, after it has made the adapter from a config: there, `check`
    compares a config that the caller passed with the folder's. `check` is not called where a `key_mapping` renames the
    tensors, where a local folder has no config, or for adapters of other methods.

    Args:
        config_class: The class of the method's configs.
        check: Called with the model, the adapter's name, the folder's config, and whether the call comes from
            `from_pretrained`. What it raises, `load_adapter` raises.
    """
    load_adapter = PeftModel.load_adapter
    if hasattr(load_adapter, _CHECKED):
        return

    @wraps(load_adapter)
    def checked(self: PeftModel, model_id: str | PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        key_mapping = kwargs.get("key_mapping")
        if isinstance(self.peft_config.get(adapter_name), config_class) and not key_mapping:
            hub_options, _ = self._split_kwargs(kwargs)
            new = _config_of(model_id, config_class, hub_options)
            if isinstance(new, config_class):  # tensors of another method are refused when the file is checked
                # from_pretrained always passes a mapping, an empty one by default; a direct call passes none.
                check(self, adapter_name, new, key_mapping is not None)
        return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    setattr(checked, _CHECKED, True)
    PeftModel.load_adapter = checked  # type: ignore[method-assign]


def _config_of(model_id: str | PathLike[str], config_class: type[PeftConfig], hub_options: dict[str, Any]) -> Any:
    folder = Path(model_id)
    if folder.is_dir() and not (folder / (hub_options.get("subfolder") or "") / CONFIG_NAME).is_file():
        return None
    return config_class.from_pretrained(str(model_id), **hub_options)
