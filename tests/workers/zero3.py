"""One process of test_zero3: `zero3.py RANK PORT FOLDER`. The tuner under DeepSpeed ZeRO-3."""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, trainable
from tests.helpers.processes import leave
from tests.workers.fsdp import PARTS, TOKENS, UNITS

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "gradient_clipping": 0.0,  # its default is 1
    "zero_allow_untested_optimizer": True,
}


def build(kind: str) -> PeftModel:
    """Whole when it is tuned, or made in partitions ("init") and gathered for that."""
    base: Any = tiny_moe() if kind == "parts" else build_tiny_llama(layers=2)
    config = CondFTConfig(target_units=PARTS if kind == "parts" else UNITS)
    if kind != "init":
        return get_peft_model(base, config)
    deepspeed.zero.Init(module=base, config_dict_or_path=CONFIG)
    with pytest.raises(ValueError, match=r"20 weights are partitions .* within deepspeed.zero.GatheredParameters"):
        get_peft_model(base, config)
    with deepspeed.zero.GatheredParameters(list(base.parameters()), modifier_rank=0):
        return get_peft_model(base, config)


def states(engine: Any, model: Any) -> dict[str, torch.Tensor]:
    """Logits in every state of merging."""
    found = {"acting": logits(engine, TOKENS)}
    model.merge_adapter(safe_merge=True)
    found["merged"] = logits(engine, TOKENS)
    with model.disable_adapter():
        found["disabled"] = logits(engine, TOKENS)
    model.merge_adapter()
    model.unmerge_adapter()
    found["unmerged"] = logits(engine, TOKENS)
    return found | {"plain": logits(model.merge_and_unload(), TOKENS)}


def trained(kind: str, own: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Trains, saves the whole adapter, and returns the trained weights and the logits of every state."""
    model = build(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    for _ in range(2):
        engine.backward(engine(input_ids=own, labels=own).loss)
        engine.step()
    parameters = trainable(model)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {f"weights/{name}": p.detach().clone() for name, p in parameters.items()}
        # in all processes: each must take part in reading the model, and the first alone writes
        model.save_pretrained(folder / f"adapter-{kind}", is_main_process=torch.distributed.get_rank() == 0)
    engine.eval()
    return weights | states(engine, model)


def main(rank: int, port: str, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for kind in ("dense", "parts", "init"):
        results = trained(kind, TOKENS[2 * rank : 2 * rank + 2], folder)
        save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{kind}-{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
