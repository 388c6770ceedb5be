"""Whole tensors and shards. Several processes: see tests/integration/test_engines.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from condft.training.engines.sharding import shard_like, whole


@pytest.fixture
def _group_of_one(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_plain_tensor_is_itself_and_detached() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    values = whole(parameter)
    assert not values.requires_grad
    assert values.data_ptr() == parameter.data_ptr()
    assert torch.equal(shard_like(parameter, torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.usefixtures("_group_of_one")
def test_a_sharded_tensor_is_gathered_and_cut_again() -> None:
    values = torch.arange(6.0).view(2, 3)
    parameter = distribute_tensor(values, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert torch.equal(whole(parameter), values)
    assert not isinstance(whole(parameter), DTensor)
    shard = shard_like(parameter, values + 1)
    assert isinstance(shard, DTensor)
    assert shard.placements == parameter.placements
    assert torch.equal(whole(shard), values + 1)
