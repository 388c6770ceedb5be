"""Memory for what trains on a rank that holds only meta tensors, until another rank's values are broadcast into it.

FSDP2 with `cpu_ram_efficient_loading` gives such ranks their shards of the first rank's values. But accelerate tells
the optimizer's parameters by their address before it shards them, and on the meta device all have the address 0: the
optimizer of such a rank would be left with the model's last parameter in the place of each of its own, and that
rank's shards would never move, without a word (accelerate 1.15; LoRA's too).
"""

import torch
from torch import nn

from condft.runtime.process_group import ProcessGroup

__all__ = ["materialize"]


def materialize(model: nn.Module) -> None:
    """On one of several ranks, moves every parameter that trains from the meta device to the CPU, filled with NaN.

    NaN and not zero: where nobody brings the values, the first loss says so. In a single process nothing is done.

    Args:
        model: With its adapter in place, before an optimizer is made of its parameters.
    """
    if ProcessGroup().size == 1:
        return
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.requires_grad:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"))
                module._parameters[name] = made[id(parameter)]  # registering is what init_empty_weights intercepts
