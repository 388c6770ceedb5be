"""Merging where ranks hold shards of the weights: DTensors (FSDP2, tensor parallelism) and partitions of ZeRO-3.

Inside `whole_tensors` a layer's tensors are whole, and merging works as ever; afterwards each rank keeps its shard of
what became of them. Written into the shard's own memory: FSDP2 gathers from there, and would go on gathering the old
values if the parameter were given other memory.
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
    """Whether ranks hold shards of any of a module's parameters, also if they are gathered just now."""
    _reshard(layer)
    return any(is_shard(parameter) for parameter in layer.parameters())


def refuse_partitions(model: nn.Module) -> None:
    """Of a model that DeepSpeed has made in partitions there is nothing here to copy or to analyze.

    Raises:
        ValueError: Weights that are partitions, and not gathered just now.
    """
    names = [name for name, parameter in model.named_parameters() if is_partition(parameter) and not parameter.numel()]
    if names:
        raise ValueError(
            f"{len(names)} weights are partitions of DeepSpeed ZeRO-3, the first is {names[0]}: call get_peft_model "
            "on all ranks within deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), or "
            "load the model without zero.Init (zero3_init_flag: false). What is trained is partitioned afterwards."
        )


def on_whole_tensors(method: Callable[..., None]) -> Callable[..., None]:
    """A method of a module that runs within `whole_tensors` of it."""

    @wraps(method)
    def run(layer: Any, *args: Any, **kwargs: Any) -> None:
        with whole_tensors(layer):
            method(layer, *args, **kwargs)

    return run


@contextmanager
def whole_tensors(layer: nn.Module) -> Iterator[None]:
    """Inside, a module's parameters are whole on every rank; afterwards they are sharded as before, with new values.

    Collective where anything is sharded: every rank must enter, and do the same. Not inside a forward.

    Args:
        layer: The module; plain parameters are left alone.

    Raises:
        ValueError: FSDP1 has taken its parameters.
    """
    _refuse_flat_parameters(layer)
    _reshard(layer)
    shards: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if is_dtensor(parameter)
    ]
    for parameters, name, shard in shards:
        whole = shard.detach().full_tensor()
        parameters[name] = nn.Parameter(whole, requires_grad=shard.requires_grad)
    try:
        with _gathered([parameter for parameter in layer.parameters() if is_partition(parameter)]):
            yield
        for parameters, name, shard in shards:
            _write(shard, parameters[name].detach())
    finally:
        for parameters, name, shard in shards:
            parameters[name] = shard


def _refuse_flat_parameters(layer: nn.Module) -> None:
    flat = [name for name, parameter in layer.named_parameters() if getattr(parameter, "_fsdp_flattened", False)]
    if flat:
        raise ValueError(
            f"cannot merge or unmerge under FSDP1: it keeps {flat[0]} and what else it shards in flat parameters and "
            "would not take over what is written into the module, not even within summon_full_params. Save the "
            "adapter and merge it in one process, or shard by FSDP2 (fsdp_version: 2)."
        )


def _gathered(partitions: list[nn.Parameter]) -> AbstractContextManager[None]:
    """DeepSpeed's own: whole inside, and what they are then is what is partitioned again."""
    if not partitions:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(partitions, modifier_rank=0)
    return gathered


def _reshard(layer: nn.Module) -> None:
    """Lets go of what FSDP2 has gathered and not freed, as it does of its outermost group after a forward."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        layer.state_dict()  # always of shards: FSDP2 has hooks on each module for that


@torch.no_grad()
def _write(shard: Any, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    own = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
    shard.to_local().copy_(own.to_local())
