"""One process of tuner/layers/test_sharded: `fsdp.py RANK PORT FOLDER`. The tuner under plain FSDP2, FSDP1 and DDP."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, trainable
from tests.helpers.processes import leave

UNITS = [
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
]
PARTS = [
    "model.embed_tokens.weight",  # which FSDP2 keeps in its outermost group, and whole after a forward
    "model.layers.0.self_attn.q_proj.weight[h1]",
    "model.layers.0.self_attn.o_proj.weight[h2]",
    "model.layers.0.mlp.experts.gate_up_proj[1]",
    "model.layers.1.mlp.experts.gate_up_proj[0]",
    "model.layers.1.mlp.experts.gate_up_proj[3]",
]
TOKENS = torch.randint(0, 96, (4, 9), generator=torch.Generator().manual_seed(3))


def build_tuned(dtype: torch.dtype = torch.float32) -> PeftModel:
    return get_peft_model(build_tiny_llama(layers=2).to(dtype), CondFTConfig(target_units=UNITS))


def build_parts() -> PeftModel:
    """Slices of weights train, and do not start at the base's values."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(tiny_moe(), CondFTConfig(target_units=PARTS, init_weights=False))


def train(model: Any, tokens: torch.Tensor, steps: int = 2) -> list[float]:
    """Each process takes the mean over its half of the batch; FSDP averages the processes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model: PeftModel, device: str = "cpu") -> PeftModel:
    mesh = init_device_mesh(device, (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def merged_and_back(model: Any) -> dict[str, torch.Tensor]:
    """Logits of a sharded model in every state of merging, and its merged weights."""
    found = {"acting": logits(model, TOKENS)}
    model.merge_adapter(safe_merge=True)
    found["merged"] = logits(model, TOKENS)
    with model.disable_adapter():
        found["disabled"] = logits(model, TOKENS)
    found["enabled"] = logits(model, TOKENS)
    model.merge_adapter()
    model.unmerge_adapter()
    found["unmerged"] = logits(model, TOKENS)
    plain = model.merge_and_unload()
    weights = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True))
    return found | {f"plain/{name}": value for name, value in weights.items()}


def fsdp2(own: torch.Tensor, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    """Trains sharded; gathers the adapter, saves it, writes it into a second sharded model; merges."""
    model = shard(build_tuned(dtype))
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.condft_weight["default"], DTensor)
    train(model, own)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    adapter = get_peft_model_state_dict(model, state_dict=gathered)
    is_main_process = torch.distributed.get_rank() == 0
    model.save_pretrained(folder / f"{dtype}", state_dict=gathered, is_main_process=is_main_process)

    second = shard(build_tuned(dtype))
    everything = {name.replace("condft_weight", "condft_weight.default"): value for name, value in adapter.items()}
    set_model_state_dict(second, everything, options=StateDictOptions(full_state_dict=True, strict=False))
    again = logits(second, TOKENS)
    return adapter | {"again": again} | merged_and_back(model)


def ddp(own: torch.Tensor) -> dict[str, torch.Tensor]:
    """The trained weights, of copies and of the same tensors unfrozen by hand."""
    tuned, plain = build_tuned(), build_tiny_llama(layers=2)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = name in UNITS
    train(DistributedDataParallel(tuned), own)
    train(DistributedDataParallel(plain), own)
    return {
        f"{name}/{n}": p for name, model in (("tuned", tuned), ("plain", plain)) for n, p in trainable(model).items()
    }


def fsdp1(own: torch.Tensor) -> dict[str, torch.Tensor]:
    wrap = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    model = FullyShardedDataParallel(
        build_tuned(), auto_wrap_policy=wrap, use_orig_params=True, device_id=torch.device("cpu")
    )
    loss = model(input_ids=own, labels=own).loss
    loss.backward()
    norm = model.clip_grad_norm_(1e9)
    with pytest.raises(ValueError, match="cannot merge or unmerge under FSDP1"):
        model.module.merge_adapter()
    with FullyShardedDataParallel.summon_full_params(model), pytest.raises(ValueError, match="under FSDP1: it keeps"):
        model.module.merge_adapter()
    with model.module.disable_adapter():
        disabled = logits(model, TOKENS)
    return {"loss": loss.detach(), "norm": norm.detach(), "disabled": disabled}


def main(rank: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = TOKENS[2 * rank : 2 * rank + 2]
    results = {
        **{f"fsdp2/{name}": value for name, value in fsdp2(own, torch.float32, folder).items()},
        **{f"bf16/{name}": value for name, value in fsdp2(own, torch.bfloat16, folder).items()},
        **{f"parts/{name}": value for name, value in merged_and_back(shard(build_parts())).items()},
        **{f"ddp/{name}": value for name, value in ddp(own).items()},
        **{f"fsdp1/{name}": value for name, value in fsdp1(own).items()},
    }
    save_file({name: value.clone().contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
