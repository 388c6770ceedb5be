"""The Accelerator of a run: launch settings of accelerate, and what it does not know by itself."""

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from condft.training.config import RunConfig

__all__ = ["make_accelerator"]


def make_accelerator(config: RunConfig, *, cpu: bool = False) -> Accelerator:
    """The Accelerator that a run of `config` needs. `accelerate launch` decides on processes, devices and engine.

    Args:
        config: The run. Its micro-batches, precision and output folder are used.
        cpu: Stay on the CPU even where there is a GPU.

    Raises:
        ValueError: fp16 under DeepSpeed.

    >>> from condft.training import load_config, make_accelerator
    >>> config = load_config("run.yaml")
    >>> make_accelerator(config, cpu=True).gradient_accumulation_steps
    1
    """
    # A plugin, not a number: `accelerate launch` exports its own default of 1, which would win over a number without
    # an error. And no coupling to the end of a data loader: every step has its full number of micro-batches.
    accumulation = GradientAccumulationPlugin(
        num_steps=config.training.gradient_accumulation_steps, sync_with_dataloader=False
    )
    # On a machine without an accelerator, accelerate takes processes started by torchrun for unrelated single ones
    # unless cpu=True is passed.
    cpu = cpu or not torch.accelerator.is_available()
    deepspeed_on_cpu = cpu and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    precision = config.training.resolve_mixed_precision()
    accelerator = Accelerator(
        # under DeepSpeed, accelerate's setting would switch on DeepSpeed's casting: see _set_deepspeed_precision
        mixed_precision="no" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else precision,
        gradient_accumulation_plugin=accumulation,
        log_with="tensorboard",
        project_dir=config.output_dir,
        # with cpu=True, accelerate 1.15 supports neither DeepSpeed nor FSDP: it would run DDP without a warning
        cpu=cpu and not deepspeed_on_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed_on_cpu else None,
    )
    if accelerator.distributed_type is DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # FSDP on CPUs. Set in both states: every new AcceleratorState() overwrites its value by PartialState's.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        _set_deepspeed_precision(accelerator, precision)
        # While this configuration is set, transformers 5 builds every model in ZeRO-3's partitions, even with
        # zero3_init_flag: false. The analysis and the copies of the selected weights would be made of empty tensors.
        unset_hf_deepspeed_config()
    return accelerator


def _set_deepspeed_precision(accelerator: Accelerator, precision: str) -> None:
    """Chooses DeepSpeed's autocast instead of its casting, which would change the base and round the fp32 copies."""
    if precision == "fp16":
        raise ValueError(
            "training.mixed_precision fp16 is not supported under DeepSpeed; use bf16, no, or another engine"
        )
    if precision == "bf16":
        accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
