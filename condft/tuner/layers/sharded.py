"""Merging where each process holds shards of the weights: DTensors (FSDP2, tensor parallelism) or ZeRO-3 partitions.

Inside `whole_tensors` a layer's tensors are whole, and merging works as in a single process. Afterwards each process
keeps its shard of the new values. They are written into the shard's own memory, because FSDP2 gathers from that
memory: if the parameter got other memory, FSDP2 would go on with the old values.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from condft.weights.shards import is_dtensor, is_partition, is_shard

__all__ = ["is_sharded", "on_whole_tensors", "refuse_partitions", "whole_tensors"]


def is_sharded(layer: nn.Module) -> bool:
    """Whether any of a module's parameters is a shard, including one that is gathered at the moment."""
    _reshard(layer)
    return any(is_shard(parameter) for parameter in layer.parameters())


def refuse_partitions(model: nn.Module) -> None:
    """Refuses a model whose weights are ZeRO-3 partitions: there are no values to copy or to analyze.

    Raises:
        ValueError: Weights that are partitions and not gathered at the moment.
    """
    names = [name for name, parameter in model.named_parameters() if is_partition(parameter) and not parameter.numel()]
    if names:
        raise ValueError(
            f"{len(names)} weights are partitions of DeepSpeed ZeRO-3, the first is {names[0]}: call get_peft_model "
            "in all processes within deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), or "
            "load the model without zero.Init (zero3_init_flag: false). Trainable weights are partitioned afterwards."
        )


def on_whole_tensors(method: Callable[..., None]) -> Callable[..., None]:
    """Decorates a method of a module: it runs within `whole_tensors` of that module."""

    @wraps(method)
    def run(layer: Any, *args: Any, **kwargs: Any) -> None:
        with whole_tensors(layer):
            method(layer, *args, **kwargs)

    return run


@contextmanager
def whole_tensors(layer: nn.Module) -> Iterator[None]:
    """In the block, a module's parameters are whole in every process. Afterwards they are shards of the new values.

    Collective if anything is sharded: every process must enter, and do the same. Not inside a forward.

    Args:
        layer: The module. Parameters that are not sharded are not changed.

    Raises:
        ValueError: The module's parameters belong to FSDP1.
    """
    # Before anything is gathered, so that a refusal leaves the layer as it was.
    _refuse_flat_parameters(layer)
    _reshard(layer)
    shards: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if is_dtensor(parameter)
    ]
    for parameters, name, shard in shards:
        # Collective: every process gathers the same parameters, in the order of the module.
        whole = shard.detach().full_tensor()
        parameters[name] = nn.Parameter(whole, requires_grad=shard.requires_grad)
    try:
        # DeepSpeed changes the parameters in place, so unlike DTensors they are not replaced here.
        with _gathered([parameter for parameter in layer.parameters() if is_partition(parameter)]):
            yield
        for parameters, name, shard in shards:
            # Not in `finally`: after an error the shards keep their old values.
            _write(shard, parameters[name].detach())
    finally:
        for parameters, name, shard in shards:
            parameters[name] = shard


def _refuse_flat_parameters(layer: nn.Module) -> None:
    flat = [name for name, parameter in layer.named_parameters() if getattr(parameter, "_fsdp_flattened", False)]
    if flat:
        raise ValueError(
            f"cannot merge or unmerge under FSDP1: it keeps {flat[0]} and the other parameters that it shards in flat "
            "parameters, and ignores what is written into the module, also within summon_full_params. Save the "
            "adapter and merge it in one process, or shard by FSDP2 (fsdp_version: 2)."
        )


def _gathered(partitions: list[nn.Parameter]) -> AbstractContextManager[None]:
    """DeepSpeed's context: in it the partitions are whole, and at its end rank 0's values are partitioned again."""
    if not partitions:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(partitions, modifier_rank=0)
    return gathered


def _reshard(layer: nn.Module) -> None:
    """Makes FSDP2 free what it has gathered. After a forward it keeps its outermost group gathered (torch 2.13).

    `state_dict()` does that: it always holds shards, and FSDP2 has a hook for it on each module.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        layer.state_dict()


# no_grad, since the shard is a leaf that may require a gradient, and is written in place.
@torch.no_grad()
def _write(shard: Any, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    # Each process has the whole values already: src_data_rank=None cuts out its own shard without communication.
    own = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.to_local().copy_(own.to_local())
