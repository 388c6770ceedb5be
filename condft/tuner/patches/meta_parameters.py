"""Gives trainable parameters memory in processes that hold only meta tensors, before an optimizer is made of them.

With FSDP2's `cpu_ram_efficient_loading` the first process loads the weights; all others build the model on the meta
device and receive their shards from the first. Before it shards a model, accelerate (1.15) identifies the optimizer's
parameters by their memory address. On the meta device every address is 0, so each of the optimizer's parameters would
be replaced by the model's last one: that process's shards would never change, without any error. LoRA adapters have
the same problem.
"""

import torch
from torch import nn

from condft.runtime.process_group import ProcessGroup

__all__ = ["materialize"]


def materialize(model: nn.Module) -> None:
    """Moves every trainable parameter from the meta device to the CPU, filled with NaN.

    NaN and not zero, so that a value that is never received shows in the first loss. A single process has nobody to
    receive values from: there, nothing is done.

    Args:
        model: With its adapter in place, before an optimizer is made of its parameters.
    """
    if ProcessGroup().size == 1:
        return
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.requires_grad:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"))
                # Not register_parameter: accelerate's init_empty_weights patches that to use the meta device.
                module._parameters[name] = made[id(parameter)]
