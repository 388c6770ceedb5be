"""The mode in which models are measured."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Within, every module is in eval mode; afterwards each module's mode is as it was.

    Yields:
        The device that inputs belong on.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """As `evaluating`, and no gradient is recorded.

    `no_grad` and not `inference_mode`: what the model keeps from a forward (rotary tables, caches) must stay usable
    in training.

    Yields:
        The device that inputs belong on.
    """
    with evaluating(model) as device, torch.no_grad():
        yield device


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards, every parameter's `requires_grad` is as it was: PEFT sets it with the adapters it turns on."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
