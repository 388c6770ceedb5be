"""A whole run: all stages, with metrics, TensorBoard events and checkpoints, from the start or resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from condft.retention.self_distillation import SelfDistillation
from condft.training.checkpoint import Checkpoint, load_parameters, save_checkpoint
from condft.training.config import RunConfig
from condft.training.engines.base import Engine
from condft.training.loop import Collate, Record, TrainResult, train_stage
from condft.training.metrics import MetricsFile, read_metrics, truncate_metrics
from condft.training.output_dir import METRICS, TENSORBOARD
from condft.training.stage import LANGUAGE_MODEL, stages_of, trainable_parameters


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
    r"""Runs all stages. Writes metrics, TensorBoard events and checkpoints into `config.output_dir`.

    Call it in every process, after `prepare_output_dir`. The model is changed in place.

    Args:
        engine: From `make_engine(make_accelerator(config))`.
        model: The model. Its parameters with `requires_grad` may train.
        examples: The training split: mappings with `features`, whose lengths group them (`group_by_length`).
        collate: Makes a batch (see `answer_loss_sum`) of a list of examples.
        config: The run.
        resume_from: A checkpoint of this run, from `find_checkpoint`, to continue from. None starts at the beginning.
        distillation: Self-distillation for the stages that train the language model.
        inputs: Hashes of the run's inputs. A checkpoint with other hashes is refused: see `Checkpoint.check_inputs`.

    Returns:
        One result for each stage. Those of stages that ended before an interruption are read from the metrics file.
        The last result always has its checkpoint.

    Raises:
        ValueError: The checkpoint belongs to another run, model or inputs; or a loss is not finite.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig
    >>> from condft.tasks.speech import SpeechCollator, compose_audio_llm, compute_features, load_manifest
    >>> from condft.tasks.speech import make_examples, precomputed_features
    >>> from condft.training import load_config, make_accelerator, make_engine, train
    >>> from condft.training.output_dir import prepare_output_dir
    >>> config = load_config("run.yaml")
    >>> audio_llm, processor = compose_audio_llm("whisper", "llama", max_seconds=2)
    >>> clips = load_manifest("clips/manifest.jsonl", split="train").clips
    >>> examples = make_examples(clips, compute_features(audio_llm, processor, clips, progress=False))
    >>> targets = r"model\.language_model\.layers\..*"
    >>> tuning = CondFTConfig(num_tensors=3, target_modules=targets, modules_to_save=["multi_modal_projector"])
    >>> model = get_peft_model(audio_llm, tuning)
    >>> output_dir = prepare_output_dir(config.output_dir)
    >>> with precomputed_features(model):
    ...     collator = SpeechCollator.for_model(audio_llm, processor)
    ...     engine = make_engine(make_accelerator(config, cpu=True))
    ...     results = train(engine, model, examples, collator, config)
    >>> [(result.stage, result.steps) for result in results]
    [('projector', 1), ('adapt', 2)]
    """
    accelerator = engine.accelerator
    # Now: a stage changes the flags, and every checkpoint holds what the whole run trains.
    names = list(trainable_parameters(model))
    if resume_from:
        resume_from.check_inputs(inputs)
    done = resume_from.global_step if resume_from else 0
    metrics_path = Path(config.output_dir) / METRICS
    # The file may have lines of steps after the checkpoint, which are about to run again. All processes read it below,
    # so they wait for the cut.
    if accelerator.is_main_process:
        truncate_metrics(metrics_path, done)
    accelerator.wait_for_everyone()
    history = read_metrics(metrics_path)
    if resume_from:
        load_parameters(resume_from, trainable_parameters(model))
    if not accelerator.trackers:
        # purge_step: TensorBoard hides the events of steps that run again
        accelerator.init_trackers(TENSORBOARD, init_kwargs={"tensorboard": {"purge_step": done + 1}})
    results: list[TrainResult] = []
    offset = 0  # optimizer steps of the stages before
    with MetricsFile(metrics_path, enabled=accelerator.is_main_process) as metrics:
        for stage in stages_of(config):
            # 0 for a stage that has not begun, all steps for one that is done.
            start = min(max(done - offset, 0), stage.steps)
            records = history[offset : offset + start]
            # A run that was interrupted right after this stage has the stage's checkpoint already.
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
                    # Each stage has its own optimizer. At the start of a stage there is no state to restore.
                    resume_from=resume_from if start else None,
                    # Sampled text does not pass the projector: while that trains alone, the KL is 0.
                    distillation=distillation if LANGUAGE_MODEL in stage.learning_rate else None,
                    on_step=recorder.record,
                    on_checkpoint=recorder.save,
                ).checkpoint
            results.append(TrainResult.of(stage.name, records, checkpoint))
            offset += stage.steps
    return results


@dataclass(frozen=True)
class _Recorder:
    """Writes a stage's records and checkpoints into the run's files, with steps counted over the whole run."""

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
        parameters = dict(self.model.named_parameters())  # again: FSDP2 replaces the objects, but keeps their names
        return save_checkpoint(
            engine,
            {name: parameters[name] for name in self.names},
            optimizer,
            schedule,
            config=self.config,
            stage=self.stage,
            step=step,
            global_step=self.offset + step,
            inputs=self.inputs,
        )
