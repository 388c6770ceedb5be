"""Inference with several adapters in one batch: the argument `adapter_names` names one adapter for each sample.

Each layer runs once for each adapter, with that adapter's samples, and with that adapter alone active in the layer. So
every kind of layer can use its ordinary forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

__all__ = ["BASE", "metadata_only", "mixed_forward", "pass_adapter_names"]

BASE = "__base__"  # PEFT's name for "no adapter"


@contextmanager
def pass_adapter_names(
    model: nn.Module,
    layer_type: type[BaseTunerLayer],
    adapter_names: Sequence[str],
    *,
    known: Sequence[str],
    num_beams: int = 1,
) -> Iterator[None]:
    """In the block, every layer of `layer_type` (and of `modules_to_save`) is called with `adapter_names`.

    Args:
        model: The base model with its wrapped layers.
        layer_type: Which layers get the names.
        adapter_names: One for each sample; `BASE` for the base model.
        known: The adapters that the model has.
        num_beams: Beam search repeats each sample that many times, except in an encoder, which runs before it.

    Raises:
        TypeError: `adapter_names` is not a list; or a layer cannot divide its batch, or its weight is computed with
            outside of its forward.
        ValueError: No adapter has one of the names, or the model is in training mode.
    """
    # Where PEFT's LoRA has an error too, the text is PEFT's, and so are the conditions.
    _check_names(model, adapter_names, known)
    _check_layers(model, layer_type)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    in_encoder = _encoder_modules(model) if num_beams > 1 else set()
    handles = []
    for module in model.modules():
        if isinstance(module, (layer_type, AuxiliaryTrainingWrapper)):
            names = list(adapter_names) if module in in_encoder else repeated
            if isinstance(module, AuxiliaryTrainingWrapper):  # it raises for adapters that do not train this module
                names = [name if name in module._adapters else BASE for name in names]
            else:
                cast(Any, module).batch_adapters = frozenset(names)
            # A hook, since the model's own modules in between do not pass the argument on.
            handles.append(module.register_forward_pre_hook(partial(_add_names, names), with_kwargs=True))
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
    # In transformers 5, get_encoder() of a model without an encoder returns the model itself.
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _check_names(model: nn.Module, adapter_names: Sequence[str], known: Sequence[str]) -> None:
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(
            f"adapter_names must be a list of adapter names, one for each sample, got {type(adapter_names).__name__}"
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
                f"{path} ({kind}) does not support mixed adapter batches: its input does not show which rows belong "
                "to which sample. Run the samples of each adapter as a separate batch, with set_adapter()."
            )


def _add_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def mixed_forward(layer: Any, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
    """A layer's forward in which each sample has its own adapter.

    Args:
        layer: The `CondFTLayer`.
        x: The layer's input; its first dimension is the samples.
        *args: Further arguments of its forward, the same for all samples.
        adapter_names: One for each sample.
        **kwargs: As `args`.

    Returns:
        The outputs, in the order of `x`.

    Raises:
        ValueError: The numbers of names and of samples differ, or an adapter is merged into the layer.
    """
    if len(adapter_names) != len(x):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if layer.merged:  # then the base layer holds one adapter's values for all samples
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    active = layer.active_adapters
    order: list[int] = []
    outputs: list[Tensor] = []
    try:
        for name in dict.fromkeys(adapter_names):  # unique, in the batch's order
            samples = [index for index, own in enumerate(adapter_names) if own == name]
            layer._active_adapter = [] if name == BASE else [name]  # set_adapter() would also change requires_grad
            layer.update_offloading()
            # Not `layer(...)`, which would run the hook that adds the names, and never end.
            outputs.append(layer.forward(x[samples], *args, **kwargs))
            order += samples
    finally:
        layer._active_adapter = active
        layer.update_offloading()
    # `order` says which sample each row is; its argsort is the inverse permutation.
    return torch.cat(outputs)[torch.tensor(order, device=x.device).argsort()]


def metadata_only(parameter: Tensor, name: str) -> Tensor:
    """A tensor with a parameter's dtype, device and shape that raises if anything is computed with it.

    For a parameter that differs from sample to sample: there is no single value to compute with.

    Args:
        parameter: The base layer's.
        name: What the error calls it.
    """
    # A view of the parameter, so that it costs no memory.
    tensor = parameter.detach().as_subclass(_MetadataOnly)
    tensor.name_of_parameter = name
    return tensor


class _MetadataOnly(Tensor):
    name_of_parameter: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "size", "dim", "numel"):  # __get__ is every property: shape, dtype, device …
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = next(arg.name_of_parameter for arg in args if isinstance(arg, cls))
        raise TypeError(
            f"the {name} is computed with outside of the layer's forward, which cannot be done with another adapter "
            "for each sample. Run the samples of each adapter as a separate batch, with set_adapter()."
        )
