"""One rank of test_ranks: `fsdp_on_rank.py RANK FOLDER`. The tuner under plain FSDP2 and FSDP1."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from condft import CondFTConfig
from tests.conftest import build_tiny_llama

UNITS = [
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
]
TOKENS = torch.randint(0, 96, (4, 9), generator=torch.Generator().manual_seed(3))


def build_tuned(dtype: torch.dtype = torch.float32) -> PeftModel:
    return get_peft_model(build_tiny_llama(layers=2).to(dtype), CondFTConfig(target_units=UNITS))


def train(model: Any, tokens: torch.Tensor, steps: int = 2) -> list[float]:
    """Each rank's mean over its own half of the batch; FSDP averages the ranks."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model: PeftModel) -> PeftModel:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(own: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Trains sharded; disables and enables; gathers the adapter; writes it into a second sharded model."""
    model = shard(build_tuned(dtype))
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.condft_weight["default"], DTensor)
    train(model, own)
    full = StateDictOptions(full_state_dict=True)
    adapter = get_peft_model_state_dict(model, state_dict=get_model_state_dict(model, options=full))
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
        with model.disable_adapter():
            disabled = model(input_ids=TOKENS).logits

    second = shard(build_tuned(dtype))
    everything = {name.replace("condft_weight", "condft_weight.default"): value for name, value in adapter.items()}
    set_model_state_dict(second, everything, options=StateDictOptions(full_state_dict=True, strict=False))
    with torch.no_grad():
        again = second(input_ids=TOKENS).logits
    return {**adapter, "logits": logits, "disabled": disabled, "again": again}


def fsdp1(own: torch.Tensor) -> dict[str, torch.Tensor]:
    wrap = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    model = FullyShardedDataParallel(
        build_tuned(), auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu")
    )
    loss = model(input_ids=own, labels=own).loss
    loss.backward()
    norm = model.clip_grad_norm_(1e9)
    return {"loss": loss.detach(), "norm": norm.detach()}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = TOKENS[2 * rank : 2 * rank + 2]
    results = {
        **{f"fsdp2/{name}": value for name, value in fsdp2(own, torch.float32).items()},
        **{f"bf16/{name}": value for name, value in fsdp2(own, torch.bfloat16).items()},
        **{f"fsdp1/{name}": value for name, value in fsdp1(own).items()},
    }
    save_file({name: value.clone().contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
