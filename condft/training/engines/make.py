"""The engine that belongs to the launch."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from condft.training.engines.base import Engine
from condft.training.engines.fsdp2 import FSDP2Engine

__all__ = ["make_engine"]


def make_engine(accelerator: Accelerator) -> Engine:
    """The engine for the way that `accelerate launch` (or nothing at all) started the processes.

    Raises:
        ValueError: FSDP1, Megatron, XLA, or DeepSpeed with another ZeRO stage than 2 and 3.

    >>> from accelerate import Accelerator
    >>> make_engine(Accelerator(cpu=True)).leaves_model_whole  # one process
    True
    """
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 2:
        return FSDP2Engine(accelerator)
    if kind is DistributedType.DEEPSPEED:
        from condft.training.engines.deepspeed import deepspeed_engine  # imports deepspeed, which is optional

        return deepspeed_engine(accelerator)
    if kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(
            f"training runs on one process, DDP, FSDP2 and DeepSpeed ZeRO-2 and 3, not on {kind.value}"
            + (" version 1: set fsdp_version: 2" if kind is DistributedType.FSDP else "")
            + "; configs/accelerate/ has a file for each engine."
        )
    return Engine(accelerator)
