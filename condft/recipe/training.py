"""The training step of a run: every stage on the encoder's stored features, and the adapter that comes out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from condft.files.atomic import atomic_directory
from condft.recipe.data import RunData
from condft.recipe.measure import make_self_distillation
from condft.tasks.speech import precomputed_features
from condft.training import RunConfig, TrainResult, train
from condft.training.checkpoint import Checkpoint, load_trained
from condft.training.engines.base import Engine

__all__ = ["Training", "save_adapter", "train_model"]


@dataclass(frozen=True)
class Training:
    """What training did.

    Attributes:
        results: One for each stage.
        checkpoint: The one taken at the end of the last stage.
        seconds: Time that training took, without sampling text for self-distillation.
    """

    results: list[TrainResult]
    checkpoint: Checkpoint
    seconds: float


def train_model(
    engine: Engine,
    model: PeftModel,
    data: RunData,
    config: RunConfig,
    *,
    resume_from: Checkpoint | None,
    inputs: Mapping[str, str],
) -> Training:
    """Runs all stages. Call it in every process.

    Args:
        engine: The engine of the run.
        model: Changed in place. Under FSDP2 and ZeRO-3 it stays sharded afterwards.
        data: The examples.
        config: The run.
        resume_from: The checkpoint to continue from; None starts at the beginning.
        inputs: Hashes of the data and the base, which every checkpoint keeps.
    """
    with precomputed_features(model):
        distillation = make_self_distillation(model, data.tokenizer, config)
        began = time.perf_counter()
        results = train(
            engine,
            model,
            data.train,
            data.collator,
            config,
            resume_from=resume_from,
            distillation=distillation,
            inputs=inputs,
        )
        seconds = time.perf_counter() - began
    checkpoint = results[-1].checkpoint
    assert checkpoint is not None  # every stage ends with one
    return Training(results, checkpoint, seconds)


def save_adapter(engine: Engine, model: PeftModel, processor: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Writes adapter and processor, from a checkpoint. All processes wait until the files are there.

    A checkpoint holds whole tensors, whichever engine sharded the model. The model itself may hold shards by now.
    """
    if engine.accelerator.is_main_process:
        with atomic_directory(folder) as temporary:
            model.save_pretrained(str(temporary), state_dict=load_trained(checkpoint))
            processor.save_pretrained(temporary)
    engine.accelerator.wait_for_everyone()
