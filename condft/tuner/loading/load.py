"""`load`: base model and adapter in one call."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from condft.tuner.config import CondFTConfig

__all__ = ["adapted", "load"]

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load(
    adapter: str | Path,
    base: nn.Module | str | Path | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    check_base: bool = True,
    **base_options: Any,
) -> PeftModel:
    """Loads a base model and a CondFT adapter on it. Importing `condft` is all that PEFT needs to know the method.

    Args:
        adapter: The adapter's folder or hub id.
        base: The base model, already loaded (it is wrapped, not copied), or its folder or hub id; by default the
            one that the adapter's config names.
        adapter_name: What to call the adapter in the model.
        is_trainable: To go on training it; by default it is for inference.
        low_cpu_mem_usage: As PEFT's: no random copies are made before the file is read.
        autocast_adapter_dtype: As PEFT's: half-precision copies become fp32.
        check_base: Whether the weights that the adapter replaces must have, in this base, the values that they had
            where it was made; see `condft.tuner.loading.base_digests`.
        base_options: For the base's `from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

    Returns:
        The model, as `PeftModel.from_pretrained` gives it.

    Raises:
        ValueError: No CondFT adapter there, no base named, an adapter that was made for another base, or a file that
            is damaged or holds something else.
    """
    config = _config_of(adapter)
    if isinstance(base, nn.Module):
        if base_options:
            raise ValueError(f"the base model is loaded already: {', '.join(base_options)} cannot act on it")
    else:
        base = _load_base(config, base, base_options)
    if not check_base:
        config.base_digests = None
    config.inference_mode = not is_trainable
    try:
        model: PeftModel = PeftModel.from_pretrained(
            base,
            str(adapter),
            config=config,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{adapter}/adapter_model.safetensors is cut short or damaged ({error}): get it anew"
        ) from error
    return model


@contextmanager
def adapted(
    model: nn.Module | str | Path, base: nn.Module | str | Path | None, adapter_name: str
) -> Iterator[nn.Module]:
    """The model with its adapter: as it is, or loaded from the adapter's folder for the time of the block.

    A base model that is handed over leaves the block without the adapter, with the gradients it asked for before.
    """
    if isinstance(model, nn.Module):
        if base is not None:
            raise ValueError("the model holds its base already: hand over base= only with an adapter's folder")
        yield model
        return
    asked = {name: p.requires_grad for name, p in base.named_parameters()} if isinstance(base, nn.Module) else {}
    live = load(model, base, adapter_name=adapter_name)
    try:
        yield live
    finally:
        plain = live.unload()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(asked.get(name, False))


def _config_of(adapter: str | Path) -> CondFTConfig:
    config = CondFTConfig.from_pretrained(str(adapter))
    if not isinstance(config, CondFTConfig):
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter: load it with PEFT itself")
    return config


def _load_base(config: CondFTConfig, base: str | Path | None, options: dict[str, Any]) -> nn.Module:
    name = base if base is not None else config.base_model_name_or_path
    if not name:
        raise ValueError("the adapter's config names no base model: hand one over, condft.load(adapter, base=...)")
    if base is None and config.revision is not None:
        options = {"revision": config.revision, **options}
    model: nn.Module = _class_of(config).from_pretrained(str(name), **options)
    return model


def _class_of(config: CondFTConfig) -> Any:
    """The class that the adapter was made from; only transformers' own, no other library is ever imported."""
    if config.task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[config.task_type])
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    if library.partition(".")[0] != "transformers":
        raise ValueError(
            f"the adapter was made from a {name or 'model'} of {library or 'an unnamed library'}: build it yourself "
            "and hand it over, condft.load(adapter, base=model)"
        )
    return getattr(importlib.import_module(library), name)
