"""One stage of training, on accelerate: the same mathematics on one CPU and on many GPUs.

The loss of an optimizer step is the mean over all answer tokens of the global batch. It does not depend on how the
batch is divided into processes and micro-batches.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from tqdm.auto import tqdm

from condft.retention.self_distillation import SelfDistillation
from condft.training.checkpoint import Checkpoint, load_training_state
from condft.training.config import TrainingConfig
from condft.training.engines.base import Engine, restoring
from condft.training.objective import answer_loss_sum, count_answer_tokens
from condft.training.sampler import EpochSampler, iter_micro_batches
from condft.training.stage import Stage, build_optimizer, build_schedule, only_components_of

Collate = Callable[[list[Any]], Mapping[str, Any]]
MicroBatches = list[tuple[list[int], Mapping[str, Any]]]
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """The result of a stage.

    Attributes:
        stage: Name of the stage.
        steps: Optimizer steps, including those before an interruption.
        losses: The loss of each step, in nats per answer token.
        final_loss: The last of them; NaN if there is none.
        seconds: Time spent in the steps.
        checkpoint: The last one taken; None if none was taken, or if it has been pruned since.

    >>> records = [{"loss": 2.0, "seconds": 0.5}, {"loss": 1.5, "seconds": 0.25}]
    >>> result = TrainResult.of("adapt", records)
    >>> result.final_loss, result.seconds
    (1.5, 0.75)
    """

    stage: str
    steps: int
    losses: list[float]
    final_loss: float
    seconds: float
    checkpoint: Checkpoint | None = field(default=None, compare=False)  # where it lies is none of the figures

    @classmethod
    def of(cls, stage: str, records: Sequence[Record], checkpoint: Checkpoint | None = None) -> "TrainResult":
        """Sums up the records of a stage's steps."""
        losses = [record["loss"] for record in records]
        seconds = math.fsum(record["seconds"] for record in records)
        return cls(stage, len(records), losses, losses[-1] if losses else math.nan, seconds, checkpoint)


def train_stage(
    engine: Engine,
    model: nn.Module,
    examples: Sequence[Any],
    collate: Collate,
    stage: Stage,
    training: TrainingConfig,
    *,
    start_step: int = 0,
    resume_from: Checkpoint | None = None,
    distillation: SelfDistillation | None = None,
    on_step: Callable[[Record], None] | None = None,
    on_checkpoint: Callable[[int, Engine, Optimizer, LambdaLR], Checkpoint] | None = None,
) -> TrainResult:
    """Trains one stage from `start_step` on. `train` calls it for each stage of a run.

    Args:
        engine: From `make_engine`. The micro-batches of a step are its accelerator's `gradient_accumulation_steps`.
        model: Changed in place. At the end it is unwrapped and its `requires_grad` flags are restored; under FSDP2
            and ZeRO-3 its parameters stay sharded.
        examples: The training split: mappings with `features`, whose lengths group them (`group_by_length`).
        collate: Makes a batch of a list of examples.
        stage: Which components train, for how many steps, at which learning rates.
        training: Batch size, schedule, clipping, weight decay, checkpoint interval.
        start_step: Number of steps already done.
        resume_from: The checkpoint that they ended in. Its parameters must be in the model already.
        distillation: Adds a KL to the loss of some steps, whose records then have `self_distillation_kl`.
        on_step: Called with each step's record.
        on_checkpoint: Takes a checkpoint. Called with the number of steps done when one is due, and at the end of
            the stage.

    Returns:
        The result of the steps of this call.

    Raises:
        ValueError: A batch without answers; a loss or gradient that is not finite; a model that the engine cannot
            train.

    >>> from peft import LoraConfig, get_peft_model
    >>> from condft.training import Stage, load_config, make_accelerator, make_engine, train_stage
    >>> config = load_config("run.yaml")
    >>> model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    >>> rows = [{"features": row, "input_ids": row} for row in token_ids]  # plain text: `features` is the length only
    >>> def collate(rows):
    ...     tokens = torch.stack([row["input_ids"] for row in rows])
    ...     return {"input_ids": tokens, "labels": tokens}
    >>> stage = Stage("text", steps=5, learning_rate={"language_model": 1e-2}, seed=0)
    >>> engine = make_engine(make_accelerator(config, cpu=True))
    >>> result = train_stage(engine, model, rows, collate, stage, config.training)
    >>> result.losses[-1] < result.losses[0]
    True
    """
    accelerator = engine.accelerator
    # Before the flags change for this stage: the check covers what trains in any stage.
    engine.check(model)
    # device_specific adds the index of the process: each draws other dropout masks.
    set_seed(stage.seed, device_specific=True)
    records: list[Record] = []
    checkpoint = None
    with restoring(model), only_components_of(stage, model, by_flag=engine.toggles_requires_grad) as parameters:
        # Before `prepare`: under FSDP2, accelerate replaces the parameters, also in the optimizer that it is given.
        optimizer = build_optimizer(stage, parameters, training.weight_decay)
        wrapped, prepared_optimizer = engine.prepare(
            model,
            optimizer,
            per_device_batch_size=training.per_device_batch_size,
            max_grad_norm=training.max_grad_norm,
        )
        wrapped.train()
        schedule = build_schedule(optimizer, stage, training)
        # After `prepare`: the state goes to the parameters that the engine made, as shards where they are shards.
        if resume_from:
            load_training_state(resume_from, engine, model, optimizer, schedule)
        batches = _iter_steps(accelerator, examples, collate, stage, training, start_step)
        stepper = _Stepper(
            engine, wrapped, model, prepared_optimizer, schedule, stage, training.max_grad_norm, distillation
        )
        bar = tqdm(
            batches,
            desc=f"stage {stage.name}",
            initial=start_step,
            total=stage.steps,
            unit="step",
            disable=not accelerator.is_main_process,
        )
        try:
            for step, batch in enumerate(bar, start=start_step + 1):
                records.append(stepper.run(step, batch))
                bar.set_postfix(loss=f"{records[-1]['loss']:.3f}", refresh=False)
                # The record first: with a metrics file of fewer steps, a checkpoint is refused at resume.
                if on_step:
                    on_step(records[-1])
                due = training.checkpoint_every and step % training.checkpoint_every == 0
                if on_checkpoint and (due or step == stage.steps):
                    checkpoint = on_checkpoint(step, engine, optimizer, schedule)
        finally:
            # accelerate keeps every prepared model and optimizer; this drops them, and closes DeepSpeed's engine.
            accelerator.free_memory()
    return TrainResult.of(stage.name, records, checkpoint)


class _Stepper:
    """One optimizer step: micro-batches in, a record out."""

    def __init__(
        self,
        engine: Engine,
        wrapped: nn.Module,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LambdaLR,
        stage: Stage,
        max_grad_norm: float | None,
        distillation: SelfDistillation | None,
    ) -> None:
        self.engine, self.accelerator = engine, engine.accelerator
        self.wrapped, self.model, self.optimizer, self.schedule = wrapped, model, optimizer, schedule
        self.stage, self.max_grad_norm, self.distillation = stage, max_grad_norm, distillation
        # From the optimizer, after `prepare`: under FSDP2 these are DTensors, not the model's former parameters.
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def run(self, step: int, micro_batches: MicroBatches) -> Record:
        accelerator, began = self.accelerator, time.perf_counter()
        # Counted before the first backward pass: each micro-batch is divided by the tokens of all of them.
        local_tokens = torch.stack([count_answer_tokens(batch["labels"]) for _, batch in micro_batches]).sum()
        tokens = int(accelerator.reduce(local_tokens.reshape(1).to(accelerator.device), reduction="sum"))
        # DDP averages gradients over processes, and accelerate divides by the number of micro-batches. The loss is the
        # sum over all of them, divided by all their tokens: this factor undoes the two divisions.
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / tokens
        sampled_texts = self_distillation_batches(self.distillation, step, accelerator) if self.distillation else []
        sums, kls = [], []
        # zip_longest: a step without self-distillation has no sampled texts.
        for (_, batch), text in zip_longest(micro_batches, sampled_texts):
            with accelerator.accumulate(self.wrapped):
                loss = answer_loss_sum(self.wrapped, send_to_device(batch, accelerator.device))
                sums.append(loss.detach())
                loss = loss * scale
                if self.distillation and text is not None:
                    # one backward pass for both terms: DeepSpeed allows only one for each micro-batch
                    kl = self.distillation.kl_to_base(self.wrapped, self.model, text)
                    kls.append(kl.detach())
                    loss = loss + self.distillation.settings.weight * kl
                self.engine.backward(loss)
        local_sums = torch.stack(sums)
        loss_value = float(accelerator.reduce(local_sums.sum().reshape(1), reduction="sum")) / tokens
        # The loss is the same number in every process after `reduce`, so all of them stop, or none. Before the
        # optimizer's step: the parameters are still good.
        if not math.isfinite(loss_value):
            bad = [not math.isfinite(value) for value in local_sums.tolist()]
            indices = [indices for (indices, _), is_bad in zip(micro_batches, bad, strict=True) if is_bad]
            self._stop(f"the loss is {loss_value}", step, gather_object(indices))
        mean_kl = self._mean_kl(step, micro_batches, kls)
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        grad_norm = self._update(step, micro_batches)
        return {
            "stage": self.stage.name,
            "step": step,
            "loss": loss_value,
            **mean_kl,
            "learning_rate": rates,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "seconds": time.perf_counter() - began,
        }

    def _mean_kl(self, step: int, micro_batches: MicroBatches, local: list[Tensor]) -> Record:
        """The KL's mean over all processes and micro-batches, which read equally much text; empty without any."""
        if not local:
            return {}
        mean = float(self.accelerator.reduce(torch.stack(local).mean().reshape(1), reduction="mean"))
        if not math.isfinite(mean):
            self._stop(f"the KL to the base is {mean}", step, gather_object([i for i, _ in micro_batches]))
        return {"self_distillation_kl": mean}

    def _update(self, step: int, micro_batches: MicroBatches) -> float:
        """Clips, steps optimizer and schedule, and returns the norm of the gradients before clipping."""
        accelerator = self.accelerator
        grad_norm = self.engine.update(self.optimizer, self.parameters, self.max_grad_norm)
        # With fp16, infinite gradients are normal: the scaler skips the step and lowers its scale.
        if accelerator.scaler is None and not math.isfinite(grad_norm):
            self._stop(f"the gradient norm is {grad_norm}", step, gather_object([i for i, _ in micro_batches]))
        # A step that the scaler skipped has trained nothing and does not count in the schedule.
        if accelerator.scaler is None or not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        # Of the model, not of the optimizer: parameters that do not train in this stage may have gradients too
        # (see Engine.toggles_requires_grad).
        self.wrapped.zero_grad()
        return grad_norm

    def _stop(self, problem: str, step: int, indices: list[list[int]]) -> None:
        raise ValueError(
            f"{problem} at step {step} of stage {self.stage.name!r}, in the batches of training examples {indices}. "
            "Lower training.learning_rate, look at these examples, or resume from the last checkpoint."
        )


def self_distillation_batches(distillation: SelfDistillation, step: int, accelerator: Accelerator) -> list[Tensor]:
    """This process's sampled texts of optimizer step `step` (from 1): one tensor for each micro-batch, or none.

    All processes and micro-batches together read the same texts in a step, however many of them there are.
    """
    settings = distillation.settings
    count, rest = divmod(step, settings.every)
    if rest:
        return []
    size, processes = settings.per_device_batch_size, accelerator.num_processes
    batch = size * processes * accelerator.gradient_accumulation_steps
    rows = iter_micro_batches(
        # Without lengths: all sampled texts are equally long.
        EpochSampler(len(distillation.tokens), distillation.seed, batch),
        start_step=count - 1,
        steps=count,
        per_device_batch_size=size,
        process_index=accelerator.process_index,
        num_processes=processes,
    )
    return [distillation.tokens[indices].to(accelerator.device) for indices in rows]


def _iter_steps(
    accelerator: Accelerator,
    examples: Sequence[Any],
    collate: Collate,
    stage: Stage,
    training: TrainingConfig,
    start_step: int,
) -> Iterator[MicroBatches]:
    """This process's micro-batches of each step, with the indices of their examples for error messages."""
    micro_batches: MicroBatches = []
    global_batch = accelerator.num_processes * accelerator.gradient_accumulation_steps * training.per_device_batch_size
    lengths = [len(example["features"]) for example in examples] if training.group_by_length else None
    for indices in iter_micro_batches(
        EpochSampler(len(examples), stage.seed, global_batch, lengths),
        start_step=start_step,
        steps=stage.steps,
        per_device_batch_size=training.per_device_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    ):
        batch = collate([examples[index] for index in indices])
        if not count_answer_tokens(batch["labels"]):
            raise ValueError(f"training examples {indices} have no answer token: are their texts empty?")
        micro_batches.append((indices, batch))
        if len(micro_batches) == accelerator.gradient_accumulation_steps:
            yield micro_batches
            micro_batches = []
