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
