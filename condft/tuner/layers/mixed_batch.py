"""Inference with several adapters in one batch: `adapter_names` in the forward names one for each sample.

The samples of one adapter go through each layer together, with that adapter alone active in that layer, so every kind
of layer is served by its own forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

__all__ = ["BASE", "adapter_names_handed_down", "mixed_forward", "unreadable"]

BASE = "__base__"  # PEFT's name for "no adapter"


@contextmanager
def adapter_names_handed_down(
    model: nn.Module,
    layer_type: type[BaseTunerLayer],
    adapter_names: Sequence[str],
    *,
    known: Sequence[str],
    num_beams: int = 1,
) -> Iterator[None]:
    """Inside, every layer of `layer_type` (and of `modules_to_save`) is called with `adapter_names`.

    Args:
        model: The base model with its wrapped layers.
        layer_type: Which layers take the names.
        adapter_names: One a sample; `BASE` for the base model.
        known: The adapters that exist.
        num_beams: Under beam search samples are repeated so often, except in an encoder, which runs before that.

    Raises:
        TypeError: `adapter_names` is no list, or a layer cannot part its batch: it says so, or its weight is computed
            with past its forward.
        ValueError: A name that no adapter has, or a model in training mode.
    """
    _check_names(model, adapter_names, known)
    _check_layers(model, layer_type)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    in_encoder = _encoder_modules(model) if num_beams > 1 else set()
    handles = []
    for module in model.modules():
        if isinstance(module, (layer_type, AuxiliaryTrainingWrapper)):
            names = list(adapter_names) if module in in_encoder else repeated
            if isinstance(module, AuxiliaryTrainingWrapper):  # it fails on adapters that it has nothing for
                names = [name if name in module._adapters else BASE for name in names]
            else:
                cast(Any, module).batch_adapters = frozenset(names)
            handles.append(module.register_forward_pre_hook(partial(_hand_down, names), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, layer_type):
                cast(Any, module).batch_adapters = frozenset()


def _encoder_modules(model: Any) -> set[nn.Module]:
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    # Since transformers 5 a model without an encoder calls itself one.
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _check_names(model: nn.Module, adapter_names: Sequence[str], known: Sequence[str]) -> None:
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(
            f"adapter_names must be a list of adapter names, one a sample, got {type(adapter_names).__name__}"
        )
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    unknown = sorted(set(adapter_names) - {BASE, *known})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {', '.join(known)}, "
            f"and {BASE!r} for the base model."
        )


def _check_layers(model: nn.Module, layer_type: type[BaseTunerLayer]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, layer_type) and not getattr(module, "takes_samples_first", False):
            kind = type(module.get_base_layer()).__name__
            raise TypeError(
                f"{path} ({kind}) does not support mixed adapter batches: its input does not tell the samples apart. "
                "Run the samples of each adapter as a batch of their own, with set_adapter()."
            )


def _hand_down(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def mixed_forward(layer: Any, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
    """The layer's forward with each sample's own adapter.

    Args:
        layer: The `CondFTLayer`.
        x: The layer's input, samples first.
        *args: The rest of what its forward takes, the same for all samples.
        adapter_names: One a sample.
        **kwargs: As `args`.

    Returns:
        The outputs, samples in the order of `x`.

    Raises:
        ValueError: Another number of names than of samples, or a merged layer.
    """
    if len(adapter_names) != len(x):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    active = layer.active_adapters
    order: list[int] = []
    outputs: list[Tensor] = []
    try:
        for name in dict.fromkeys(adapter_names):
            samples = [index for index, own in enumerate(adapter_names) if own == name]
            layer._active_adapter = [] if name == BASE else [name]  # set_adapter() would switch gradients on and off
            layer.settle()
            outputs.append(layer.forward(x[samples], *args, **kwargs))
            order += samples
    finally:
        layer._active_adapter = active
        layer.settle()
    return torch.cat(outputs)[torch.tensor(order, device=x.device).argsort()]


def unreadable(parameter: Tensor, name: str) -> Tensor:
    """A parameter that each sample has its own of: it tells its dtype, device and shape, and computes nothing.

    Args:
        parameter: The base layer's.
        name: What the error calls it.
    """
    tensor = parameter.detach().as_subclass(_Unreadable)
    tensor.name_of_parameter = name
    return tensor


class _Unreadable(Tensor):
    name_of_parameter: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "size", "dim", "numel"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = next(arg.name_of_parameter for arg in args if isinstance(arg, cls))
        raise TypeError(
            f"the {name} is computed with past the layer's forward, which cannot be done for each sample with its own "
            "adapter. Run the samples of each adapter as a batch of their own, with set_adapter()."
        )
