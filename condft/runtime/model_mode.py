"""Context managers that set the mode of a model and restore it: eval mode, gradients, `requires_grad`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Inside, every module is in eval mode; afterwards each module has the mode that it had before.

    Yields:
        The device for inputs.

    >>> base = base.train()
    >>> with evaluating(base) as device:
    ...     base.training, device.type
    (False, 'cpu')
    >>> base.training
    True
    """
    # Each module's own: a frozen part may be in eval mode while the rest trains, and `model.train()` would change it.
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training  # not `train()`, which would set all submodules too


@contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """As `evaluating`, and no gradient is recorded.

    `no_grad` and not `inference_mode`: tensors that the model keeps from a forward (rotary tables, caches) must stay
    usable in training.

    Yields:
        The device for inputs.
    """
    with evaluating(model) as device, torch.no_grad():
        yield device


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards, every parameter has the `requires_grad` that it had: PEFT changes it when it enables an adapter."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
