"""A whole run: every stage, with its metrics, TensorBoard events and checkpoints, from the start or resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from condft.retention.self_distillation import SelfDistillation
from condft.training.checkpoint import Checkpoint, load_parameters, save_checkpoint
from condft.training.config import RunConfig
from condft.training.engines.engine import Engine
from condft.training.loop import Collate, Record, TrainResult, train_stage
from condft.training.metrics import MetricsFile, read_metrics, truncate_metrics
from condft.training.output_dir import METRICS, TENSORBOARD
from condft.training.stage import LANGUAGE_MODEL, stages_of, trainable_parameters


def make_accelerator(config: RunConfig, *, cpu: bool = False) -> Accelerator:
    """The Accelerator that a run of `config` needs; `accelerate launch` decides about ranks, devices and engine."""
    # A plugin, not a number: `accelerate launch` exports its own default of 1, which would silently win. And no
    # coupling to the end of a data loader: every step has its full number of micro-batches.
    accumulation = GradientAccumulationPlugin(
        num_steps=config.training.gradient_accumulation_steps, sync_with_dataloader=False
    )
    # Without an accelerator, accelerate takes ranks started by torchrun for single processes unless told so.
    cpu = cpu or not torch.accelerator.is_available()
    deepspeed_on_cpu = cpu and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    precision = config.training.resolve_mixed_precision()
    accelerator = Accelerator(
        mixed_precision="no" if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else precision,
        gradient_accumulation_plugin=accumulation,
        log_with="tensorboard",
        project_dir=config.output_dir,
        # accelerate knows neither DeepSpeed nor FSDP with cpu=True: it would run DDP and say nothing.
        cpu=cpu and not deepspeed_on_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed_on_cpu else None,
    )
    if accelerator.distributed_type is DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # in both states: every new AcceleratorState() copies what PartialState says over its own
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        _set_deepspeed_precision(accelerator, precision)
        # Else transformers builds every model in ZeRO-3's partitions, whatever zero3_init_flag says, and the analysis
        # and the copies of the selected weights would be made of empty tensors.
        unset_hf_deepspeed_config()
    return accelerator


def _set_deepspeed_precision(accelerator: Accelerator, precision: str) -> None:
    """DeepSpeed's autocast instead of its casting, which would change the frozen base and round the fp32 copies."""
    if precision == "fp16":
        raise ValueError(
            "training.mixed_precision fp16 does not run under DeepSpeed; take bf16, no, or another engine"
        )
    if precision == "bf16":
        accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def train(
    engine: Engine,
    model: nn.Module,
    examples: Sequence[Any],
    collate: Collate,
    config: RunConfig,
    *,
    resume_from: Checkpoint | None = None,
    distillation: SelfDistillation | None = None,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> list[TrainResult]:
    """Runs all stages; writes metrics, TensorBoard events and checkpoints below `config.output_dir`.

    Call it on every rank, after `prepare_output_dir`. The model is changed in place.

    Args:
        engine: From `make_engine(make_accelerator(config))`.
        model: The built model; what may train has `requires_grad`.
        examples: The training split.
        collate: Makes a batch (see `answer_loss_sum`) of a list of examples.
        config: The run.
        resume_from: Go on from this checkpoint of the run, from `find_checkpoint`.
        distillation: Of the stages that train the language model.
        inputs: Digests that a checkpoint must share to be resumed, see `Checkpoint.check_inputs`.

    Returns:
        One result a stage; for stages done before an interruption, as their metrics say. The last one always has its
        checkpoint.

    Raises:
        ValueError: The checkpoint is of another run, model or inputs, or a loss is not finite.
    """
    accelerator = engine.accelerator
    names = list(trainable_parameters(model))
    if resume_from:
        resume_from.check_inputs(inputs)
    done = resume_from.global_step if resume_from else 0
    metrics_path = Path(config.output_dir) / METRICS
    if accelerator.is_main_process:
        truncate_metrics(metrics_path, done)
    accelerator.wait_for_everyone()
    history = read_metrics(metrics_path)
    if resume_from:
        load_parameters(resume_from, trainable_parameters(model))
    if not accelerator.trackers:
        accelerator.init_trackers(TENSORBOARD, init_kwargs={"tensorboard": {"purge_step": done + 1}})
    results: list[TrainResult] = []
    offset = 0
    with MetricsFile(metrics_path, enabled=accelerator.is_main_process) as metrics:
        for stage in stages_of(config):
            start = min(max(done - offset, 0), stage.steps)
            records = history[offset : offset + start]
            checkpoint = resume_from if done == offset + stage.steps else None
            if start < stage.steps:
                recorder = _Recorder(accelerator, config, metrics, model, names, inputs, stage.name, offset, records)
                checkpoint = train_stage(
                    engine,
                    model,
                    examples,
                    collate,
                    stage,
                    config.training,
                    start_step=start,
                    resume_from=resume_from if start else None,
                    distillation=distillation if LANGUAGE_MODEL in stage.learning_rate else None,
                    on_step=recorder.record,
                    on_checkpoint=recorder.save,
                ).checkpoint
            results.append(TrainResult.of(stage.name, records, checkpoint))
            offset += stage.steps
    return results


@dataclass(frozen=True)
class _Recorder:
    """Puts a stage's records into the run's files, counting steps over the whole run."""

    accelerator: Accelerator
    config: RunConfig
    metrics: MetricsFile
    model: nn.Module
    names: Sequence[str]
    inputs: Mapping[str, str]
    stage: str
    offset: int
    records: list[Record]

    def record(self, record: Record) -> None:
        self.records.append(record)
        step = self.offset + record["step"]
        self.metrics.append({"global_step": step, **record})
        if record["step"] % self.config.training.log_every == 0:
            shown = ("loss", "self_distillation_kl", "grad_norm", "tokens", "seconds")
            values = {key: record[key] for key in shown if key in record}
            values |= {f"learning_rate/{name}": rate for name, rate in record["learning_rate"].items()}
            self.accelerator.log({f"{self.stage}/{key}": value for key, value in values.items()}, step=step)

    def save(self, step: int, engine: Engine, optimizer: Optimizer, schedule: LambdaLR) -> Checkpoint:
        here = dict(self.model.named_parameters())  # looked up anew: sharding replaces the objects, not the names
        return save_checkpoint(
            engine,
            {name: here[name] for name in self.names},
            optimizer,
            schedule,
            config=self.config,
            stage=self.stage,
            step=step,
            global_step=self.offset + step,
            inputs=self.inputs,
        )
