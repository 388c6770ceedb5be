"""Training on accelerate: configuration, stages, checkpoints, engines, and the check of frozen weights.

A whole run, in every process:

    config = load_config("run.yaml")
    engine = make_engine(make_accelerator(config))
    prepare_output_dir(config.output_dir)
    before = checksum_tensors(frozen_tensors(model))  # the base, before get_peft_model
    train(engine, peft_model, examples, collate, config)
    compare_checksums(before, checksum_tensors(frozen_tensors(peft_model)))
"""

from condft.runtime.extras import needs_extra

# tensorboard too, which is imported late: without it, accelerate would drop the events and say nothing.
with needs_extra("recipe"):
    from condft.training.accelerator import make_accelerator
    from condft.training.checkpoint import find_checkpoint
    from condft.training.config import RunConfig, TrainingConfig
    from condft.training.config_file import load_config
    from condft.training.engines.make import make_engine
    from condft.training.freeze_check import FreezeReport, checksum_tensors, compare_checksums, frozen_tensors
    from condft.training.loop import TrainResult, train_stage
    from condft.training.metrics import read_metrics
    from condft.training.output_dir import prepare_output_dir
    from condft.training.run import train
    from condft.training.stage import Stage

__all__ = [
    "FreezeReport",
    "RunConfig",
    "Stage",
    "TrainResult",
    "TrainingConfig",
    "checksum_tensors",
    "compare_checksums",
    "find_checkpoint",
    "frozen_tensors",
    "load_config",
    "make_accelerator",
    "make_engine",
    "prepare_output_dir",
    "read_metrics",
    "train",
    "train_stage",
]
