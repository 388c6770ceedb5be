"""One process of tests/integration/test_engines.py: `accelerate launch … train.py CONFIG.yaml OUT.pt DEVICE`.

Trains a whole run, then one that is cut off in its last stage and resumed, and leaves what the test compares.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType
from peft import PeftModel

from condft.training import (
    RunConfig,
    TrainResult,
    checksum_tensors,
    compare_checksums,
    find_checkpoint,
    frozen_tensors,
    load_config,
    make_accelerator,
    make_engine,
    prepare_output_dir,
    train,
)
from condft.training.checkpoint import load_trained
from condft.training.loop import Collate
from tests.helpers.models.trainees import build_condft_trainee, build_examples, build_self_distillation, collate
from tests.helpers.processes import leave


class CutOff(BaseException):
    """Like KeyboardInterrupt: no code catches it."""


def kind_of(parameter: torch.nn.Parameter) -> str:
    return type(parameter.data).__name__ if parameter.numel() else "partition"  # DeepSpeed leaves nothing of it here


def odd_state_comes_back(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed gives back the optimizer state of parameters of 15 and 5 numbers, which two cannot halve."""
    model: Any = torch.nn.Linear(3, 5, device=accelerator.device)
    engine, optimizer = make_engine(accelerator), torch.optim.AdamW(model.parameters())
    engine.prepare(model, optimizer, per_device_batch_size=1, max_grad_norm=1.0)
    found = []
    for shape, parameter in (((5, 3), model.weight), ((5,), model.bias)):
        moments = {key: torch.rand(shape, device=accelerator.device) for key in ("exp_avg", "exp_avg_sq")}
        moments = {key: accelerator.reduce(value, reduction="sum") for key, value in moments.items()}
        given = moments | {"step": torch.tensor(3.0)}
        engine.set_state(optimizer, parameter, given)
        back = engine.whole_state(optimizer, parameter)
        found.append(back.keys() == given.keys() and all(torch.equal(back[key], given[key]) for key in given))
    return all(found)


def check_refusals(accelerator: Accelerator) -> None:
    """What DeepSpeed's engines do not take."""
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero["stage"] == 3:
        mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
        with pytest.raises(ValueError, match=r"0.weight is torch.float32 and 1.weight is torch.bfloat16.*use ZeRO-2"):
            make_engine(accelerator).check(mixed)
    zero["stage"], stage = 1, zero["stage"]
    with pytest.raises(ValueError, match=r"DeepSpeed with ZeRO stage 1: .* Set zero_stage: 2 or 3"):
        make_engine(accelerator)
    zero["stage"] = stage


def main(config_path: str, target: str, device: str) -> None:
    torch.set_num_threads(1)
    config = load_config(config_path)
    accelerator = make_accelerator(config, cpu=device == "cpu")
    if accelerator.state.deepspeed_plugin is not None and accelerator.state.deepspeed_plugin.zero_stage == 3:
        # else it would leave tensors as small as these whole
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    prepare_output_dir(config.output_dir)
    # as cpu_ram_efficient_loading leaves it: the weights on the first rank alone
    efficient = getattr(getattr(accelerator.state, "fsdp_plugin", None), "cpu_ram_efficient_loading", False)
    empty = init_empty_weights if efficient and not accelerator.is_main_process else nullcontext

    engine = make_engine(accelerator)

    def build() -> PeftModel:
        with empty():
            model = build_condft_trainee()
        return model if empty is init_empty_weights else model.to(accelerator.device)

    def train_one(model: PeftModel, collate: Collate, config: RunConfig, **options: Any) -> list[TrainResult]:
        settings = config.training.self_distillation
        distillation = build_self_distillation(model, settings) if settings else None
        return train(engine, model, examples, collate, config, distillation=distillation, **options)

    model, examples = build(), build_examples()
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    assert on_meta == (empty is init_empty_weights)
    before = {} if on_meta else checksum_tensors(frozen_tensors(model), progress=False)
    results = train_one(model, collate, config)
    after = checksum_tensors(frozen_tensors(model), progress=False)
    checkpoint = find_checkpoint(config, num_processes=accelerator.num_processes)
    assert checkpoint is not None
    if accelerator.is_main_process:
        frozen = compare_checksums(before, after)
        model.save_pretrained(Path(config.output_dir) / "adapter", state_dict=load_trained(checkpoint))

    again = config.model_copy(update={"output_dir": f"{config.output_dir}-again"})
    prepare_output_dir(again.output_dir)
    left = iter(range(11))  # of 2 micro-batches a step: the 6th of 7 steps is cut off

    def cut_off(batch: list) -> dict:
        if next(left, None) is None:
            raise CutOff
        return collate(batch)

    try:
        train_one(build(), cut_off, again)
    except CutOff:
        accelerator.wait_for_everyone()
    resume_from = find_checkpoint(again, num_processes=accelerator.num_processes)
    resumed = train_one(build(), collate, again, resume_from=resume_from)
    if accelerator.is_main_process:
        result = {
            "engine": str(accelerator.distributed_type),
            "processes": accelerator.num_processes,
            "sharded": sorted({kind_of(parameter) for parameter in model.parameters()}),
            "losses": [result.losses for result in results],
            "resumed": [result.losses for result in resumed],
            "trained": load_trained(checkpoint),
            "frozen": (frozen.unchanged, frozen.checked),
        }
    odd = True
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        check_refusals(accelerator)
        odd = odd_state_comes_back(accelerator)
    if accelerator.is_main_process:
        torch.save(result | {"odd_state": odd}, target)
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
