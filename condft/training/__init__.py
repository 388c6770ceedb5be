"""Training: typed configuration, an accelerate loop over stages, checkpoints, and the proof of freeze."""

from condft.training.accelerator import make_accelerator
from condft.training.checkpoint import Checkpoint, find_checkpoint
from condft.training.config import RunConfig, TrainingConfig
from condft.training.config_file import load_config
from condft.training.engines.base import Engine
from condft.training.engines.make import make_engine
from condft.training.freeze_check import FreezeReport, checksum_tensors, compare, frozen_tensors
from condft.training.loop import TrainResult, train_stage
from condft.training.metrics import read_metrics
from condft.training.output_dir import prepare_output_dir, remove_run
from condft.training.run import train
from condft.training.stage import Stage, stages_of

__all__ = [
    "Checkpoint",
    "Engine",
    "FreezeReport",
    "RunConfig",
    "Stage",
    "TrainResult",
    "TrainingConfig",
    "checksum_tensors",
    "compare",
    "find_checkpoint",
    "frozen_tensors",
    "load_config",
    "make_accelerator",
    "make_engine",
    "prepare_output_dir",
    "read_metrics",
    "remove_run",
    "stages_of",
    "train",
    "train_stage",
]
