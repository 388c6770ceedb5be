"""No pickle is ever read for a CondFT adapter: `adapter_model.bin` is refused at the two doors that would open it.

PEFT and transformers fall back to `adapter_model.bin` where there is no safetensors file, and read it by `torch.load`.
Neither asks the method first, so their one function each that reads such a file is put behind a look at
`adapter_config.json` beside it: a folder of another method, or a safetensors file, passes untouched.
"""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers.modeling_utils
from peft.utils import save_and_load

from condft.tuner.registration import METHOD_NAME

__all__ = ["refuse_pickled_adapters"]

_GUARDED = "_condft_guarded"


def refuse_pickled_adapters() -> None:
    """Guards both doors; does nothing if that is done already (a second import)."""
    _guard(save_and_load, "torch_load")
    _guard(transformers.modeling_utils, "load_state_dict")


def _guard(module: ModuleType, name: str) -> None:
    read: Callable[..., Any] = getattr(module, name)
    if hasattr(read, _GUARDED):
        return

    @wraps(read)
    def guarded(file: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_pickled_adapter(file)
        return read(file, *args, **kwargs)

    setattr(guarded, _GUARDED, True)
    setattr(module, name, guarded)


def _refuse_pickled_adapter(file: Any) -> None:
    if not isinstance(file, str | Path) or str(file).endswith(".safetensors"):
        return
    path = Path(file)
    config = path.parent / "adapter_config.json"
    if not path.name.startswith("adapter_model") or not config.is_file():
        return
    if json.loads(config.read_text(encoding="utf-8")).get("peft_type") == METHOD_NAME.upper():
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; CondFT adapters are read from safetensors only. "
            "Ask for adapter_model.safetensors (save_pretrained writes it by default), or, if you trust the file, "
            'convert it: safetensors.torch.save_file(torch.load("adapter_model.bin", weights_only=True), '
            '"adapter_model.safetensors").'
        )
