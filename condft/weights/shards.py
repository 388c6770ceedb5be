"""Recognizes a tensor of which each process holds a part only: a DTensor, or a partition of DeepSpeed's ZeRO-3."""

from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_dtensor", "is_partition", "is_shard"]


def is_dtensor(tensor: object) -> TypeGuard["DTensor"]:
    """Whether a tensor is a DTensor: a shard by FSDP2 or tensor parallelism, which `full_tensor()` gathers.

    Recognized by that method, not by its class: `torch.distributed.tensor` is not in every build of torch.
    """
    return hasattr(tensor, "full_tensor")


def is_partition(tensor: object) -> bool:
    """Whether a parameter is one that DeepSpeed's ZeRO-3 partitions; outside of its own context it has no entries.

    Recognized by the attribute that DeepSpeed itself checks (`deepspeed.zero`, 0.19).
    """
    return hasattr(tensor, "ds_id")


def is_shard(tensor: object) -> bool:
    """Whether each process holds a part of the tensor only, of either kind.

    >>> import torch
    >>> is_shard(torch.ones(2, 2))
    False
    """
    return is_dtensor(tensor) or is_partition(tensor)
