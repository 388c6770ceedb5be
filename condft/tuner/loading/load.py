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

# PEFT's task types -> the classes of transformers that load a model for them.
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
    """Loads a base model, and a CondFT adapter on it.

    `PeftModel.from_pretrained` loads CondFT adapters too, once `condft` is imported; here the base is found by itself.

    Args:
        adapter: The adapter's folder or hub id.
        base: The base model, already loaded (it is wrapped, not copied), or its folder or hub id. By default the one
            that the adapter's config names.
        adapter_name: The adapter's name in the model.
        is_trainable: True to train it further; by default it is for inference.
        low_cpu_mem_usage: As for PEFT: the copies get no memory before the file is read.
        autocast_adapter_dtype: As for PEFT: half-precision copies become fp32.
        check_base: Whether the weights that the adapter replaces must have the same values in this base as in the one
            that it was made on; see `condft.tuner.loading.base_digests`.
        base_options: For the base's `from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

    Returns:
        The same model as from `PeftModel.from_pretrained`.

    Raises:
        ValueError: The folder holds no CondFT adapter; no base is named; the adapter was made for another base; or its
            file is damaged or holds other tensors.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, load
    >>> base.save_pretrained("base")
    >>> model = get_peft_model(base.from_pretrained("base"), CondFTConfig(num_tensors=2))
    >>> model.save_pretrained("adapter")
    >>> loaded = load("adapter")
    >>> loaded.get_base_model().name_or_path
    'base'
    >>> loaded(input_ids=token_ids).logits.shape
    torch.Size([2, 9, 96])
    """
    config = _config_of(adapter)
    if isinstance(base, nn.Module):
        if base_options:
            raise ValueError(f"the base model is loaded already: {', '.join(base_options)} cannot change it any more")
    else:
        base = _load_base(config, base, base_options)
    if not check_base:
        # Before the config is handed over: CondFTModel compares with what it says.
        config.base_digests = None
    config.inference_mode = not is_trainable
    try:
        model: PeftModel = PeftModel.from_pretrained(
            base,
            str(adapter),
            config=config,  # with this function's changes; PEFT would read the file again
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    except SafetensorError as error:
        raise ValueError(
            f"{adapter}/adapter_model.safetensors is cut short or damaged ({error}): download or save it again"
        ) from error
    return model


@contextmanager
def adapted(
    model: nn.Module | str | Path, base: nn.Module | str | Path | None, adapter_name: str
) -> Iterator[nn.Module]:
    """The model with its adapter. If `model` is an adapter's folder, it is loaded for the block.

    A base model that the caller passed has no adapter after the block, and its `requires_grad` flags are restored.

    Raises:
        ValueError: Both a model and a base are given.
    """
    if isinstance(model, nn.Module):
        if base is not None:
            raise ValueError("the model holds its base already: pass base= only with an adapter's folder")
        yield model
        return
    flags = {name: p.requires_grad for name, p in base.named_parameters()} if isinstance(base, nn.Module) else {}
    live = load(model, base, adapter_name=adapter_name)
    try:
        yield live
    finally:
        plain = live.unload()
        # PEFT has frozen the base when it put the adapter on, and unload() leaves it frozen.
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(flags.get(name, False))


def _config_of(adapter: str | Path) -> CondFTConfig:
    config = CondFTConfig.from_pretrained(str(adapter))
    if not isinstance(config, CondFTConfig):  # PEFT makes the class that the file's peft_type names
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter: load it with PEFT itself")
    return config


def _load_base(config: CondFTConfig, base: str | Path | None, options: dict[str, Any]) -> nn.Module:
    name = base if base is not None else config.base_model_name_or_path
    if not name:
        raise ValueError("the adapter's config names no base model: pass one, condft.load(adapter, base=...)")
    # The recorded revision is of the recorded base; another base that the caller names has other revisions.
    if base is None and config.revision is not None:
        options = {"revision": config.revision, **options}  # a revision that the caller gives replaces it
    model: nn.Module = _class_of(config).from_pretrained(str(name), **options)
    return model


def _class_of(config: CondFTConfig) -> Any:
    """The class of the adapter's base model. Only transformers is imported: the config may come from a stranger."""
    if config.task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[config.task_type])
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    if library.partition(".")[0] != "transformers":
        raise ValueError(
            f"the adapter was made from a {name or 'model'} of {library or 'an unnamed library'}: build it yourself "
            "and pass it, condft.load(adapter, base=model)"
        )
    return getattr(importlib.import_module(library), name)
