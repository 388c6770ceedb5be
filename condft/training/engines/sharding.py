"""Whole tensors from shards (FSDP2) and partitions (ZeRO-3), and shards from whole tensors."""

from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from condft.weights.shards import is_dtensor, is_partition

__all__ = ["shard_like", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """The whole values of a tensor that may be sharded (FSDP2) or partitioned (ZeRO-3), detached.

    Collective where it is: call it in every process.
    """
    if is_partition(tensor):
        import deepspeed  # optional; installed wherever there is such a parameter

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()  # a copy: DeepSpeed frees the gathered values at the end of the context
    if is_dtensor(tensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]  # detach is typed Tensor
    return tensor.detach()


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole value as `parameter` is kept: under FSDP2 this process's shard of it, else all of it.

    Not collective: every process cuts its own shard (`src_data_rank=None`), without communication.
    """
    value = value.to(parameter.device)
    if not is_dtensor(parameter):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
