"""A shard is known by what its library gives it: FSDP2's DTensors by a real one, DeepSpeed's by its attribute."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from condft.weights.shards import is_dtensor, is_partition, is_shard


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_plain_tensor_is_none() -> None:
    for tensor in (torch.ones(2), nn.Parameter(torch.ones(2)), torch.empty(2, device="meta")):
        assert not is_shard(tensor)


@pytest.mark.usefixtures("one_process_group")
def test_a_dtensor_is_one() -> None:
    shard = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Replicate()])
    assert is_dtensor(shard)
    assert is_shard(nn.Parameter(shard))
    assert not is_partition(shard)
    assert torch.equal(shard.full_tensor(), torch.ones(4, 2))


def test_a_partition_of_deepspeed_is_one() -> None:
    partition = nn.Parameter(torch.empty(0))
    partition.ds_id = 3  # type: ignore[attr-defined]
    assert is_partition(partition)
    assert is_shard(partition)
    assert not is_dtensor(partition)
