"""One process of test_meta_processes: `meta.py RANK PORT FOLDER`. The first has the weights.

As after `cpu_ram_efficient_loading`: get_peft_model chooses on both, then accelerate shards by FSDP2 and broadcasts.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState, init_empty_weights
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from condft import CondFTConfig, analyze
from condft.training.engines.sharding import whole
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe
from tests.helpers.processes import leave
from tests.workers.fsdp import TOKENS

OPTIONS: dict[str, Any] = {"trainable_fraction": 0.4, "modules_to_save": ["lm_head"]}
ENVIRONMENT = {
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def on_rank(rank: int, build: Callable[[], Any]) -> Any:
    """The model; only the first process has its weights."""
    if rank == 0:
        return build()
    with init_empty_weights():
        model = build()
    model.tie_weights()
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def choices(rank: int) -> dict[str, list[str]]:
    """The units that this process chooses. Where the configs differ, the first process's decides."""

    def chosen(build: Callable[[], Any] = build_tiny_llama, **options: Any) -> list[str]:
        model = get_peft_model(on_rank(rank, build), CondFTConfig(**options))
        return model.peft_config["default"].target_units

    report = analyze(on_rank(rank, build_tiny_llama), progress=False)
    return {
        "lowest": chosen(num_tensors=6),
        "fraction": chosen(trainable_fraction=0.2, score="entropy_deficit"),
        "heads": chosen(granularity="head", num_tensors=9),
        "experts": chosen(tiny_moe, num_tensors=5),
        "random": chosen(order="random", seed=rank, num_tensors=5),
        "report": chosen(report=report if rank == 0 else None, num_tensors=7),
    }


def refusals(rank: int) -> dict[str, str]:
    """Errors are the same in both processes, and neither waits for the other."""

    def message(build: Callable[[], Any], **options: Any) -> str:
        try:
            get_peft_model(build(), CondFTConfig(**options))
        except ValueError as error:
            return str(error)
        return "no error"

    other = analyze(on_rank(rank, lambda: build_tiny_llama(seed=1)), progress=False)
    return {
        "nowhere": message(lambda: on_rank(1, build_tiny_llama), num_tensors=3),
        "other": message(lambda: on_rank(rank, build_tiny_llama), report=other),
        "no_match": message(lambda: on_rank(rank, build_tiny_llama), target_modules=["q_prj"]),
        "tied": message(lambda: on_rank(rank, build_tiny_llama), target_modules=["embed_tokens"]),
    }


def make_accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)  # it runs FSDP on GPUs only, unless its state says otherwise
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    assert accelerator.is_fsdp2
    assert accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    return accelerator


def build_tuned(rank: int) -> PeftModel:
    return get_peft_model(
        on_rank(rank, lambda: build_tiny_llama(layers=2, tied=False).to(torch.bfloat16)), CondFTConfig(**OPTIONS)
    )


def trained(accelerator: Accelerator, rank: int) -> dict[str, torch.Tensor]:
    """All weights after the preparation, which trained ones the optimizer has, and their values after two steps."""
    model: Any = build_tuned(rank)
    placeholders = [p for p in model.parameters() if p.requires_grad]
    assert rank == 0 or all(torch.isnan(p).all() for p in placeholders)
    optimizer: Any = torch.optim.AdamW(placeholders, lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    ours = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in ours}
    results = {f"before/{name}": whole(p).clone() for name, p in model.named_parameters()}
    own = TOKENS[2 * rank : 2 * rank + 2]
    for _ in range(2):
        accelerator.backward(model(input_ids=own, labels=own).loss)
        optimizer.step()
        optimizer.zero_grad()
    return results | {f"after/{name}": whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def main(rank: int, port: str, folder: Path) -> None:
    os.environ |= ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    save_file(trained(accelerator, rank), folder / f"{rank}.safetensors")
    found = {"choices": choices(rank), "refusals": refusals(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
