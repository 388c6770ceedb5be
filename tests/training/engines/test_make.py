"""The engine follows the launch; launches without an engine are refused."""

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from condft.training.engines.base import Engine
from condft.training.engines.fsdp2 import FSDP2Engine
from condft.training.engines.make import make_engine


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_one_process_and_ddp_share_an_engine(kind: DistributedType) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    assert type(make_engine(accelerator)) is Engine


def test_fsdp2_has_its_own() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert type(make_engine(accelerator)) is FSDP2Engine


@pytest.mark.parametrize("kind", [DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_other_launches_are_refused(kind: DistributedType) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(ValueError, match=f"ZeRO-2 and 3, not on {kind.value}; configs/accelerate/ has a file"):
        make_engine(accelerator)


def test_fsdp1_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="not on FSDP version 1: set fsdp_version: 2"):
        make_engine(accelerator)
