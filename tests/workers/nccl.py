"""One process of tuner/layers/test_sharded on two GPUs: `nccl.py RANK PORT FOLDER`. DDP and FSDP2 over NCCL."""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.models.tiny_models import logits
from tests.helpers.processes import leave
from tests.workers.fsdp import TOKENS, build_tuned, shard, train

DEVICE = "cuda"


def found_by(engine: str, rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Trains, saves the whole adapter, and returns it with the logits of every state of merging."""
    own, everything = TOKENS[2 * rank : 2 * rank + 2].to(DEVICE), TOKENS.to(DEVICE)
    model: Any = build_tuned().to(DEVICE)
    train(DistributedDataParallel(model) if engine == "ddp" else shard(model, DEVICE), own)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder / engine, state_dict=gathered, is_main_process=rank == 0)
    found = get_peft_model_state_dict(model, state_dict=gathered) | {"acting": logits(model, everything)}
    model.merge_adapter(safe_merge=True)
    found["merged"] = logits(model, everything)
    model.unmerge_adapter()
    with model.disable_adapter():
        found["disabled"] = logits(model, everything)
    return {f"{engine}/{name}": value.cpu() for name, value in found.items()}


def main(rank: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    torch.distributed.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = found_by("ddp", rank, folder) | found_by("fsdp2", rank, folder)
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
