"""A run for test_run's multi-process tests: `torchrun … train_on_rank.py CONFIG.yaml OUT.pt [--resume]`."""

import sys

import torch
from conftest import build_examples, build_trainee, collate

from condft.training import load_config, make_accelerator, prepare_output_dir, train


def main(config_path: str, target: str, resume: bool) -> None:
    torch.set_num_threads(1)
    config = load_config(config_path)
    accelerator = make_accelerator(config, cpu=True)
    prepare_output_dir(config.output_dir, resume=resume)
    model = build_trainee()
    results = train(accelerator, model, build_examples(), collate, config, resume=resume)
    if accelerator.is_main_process:
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        losses = [result.losses for result in results]
        torch.save({"losses": losses, "trained": trained, "processes": accelerator.num_processes}, target)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--resume" in sys.argv)
