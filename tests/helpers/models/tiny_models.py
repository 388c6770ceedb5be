"""Tiny real models with fused experts, and checks that hold for every model."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from condft.tuner import CondFTLayer

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_moe(kind: str = "mixtral", implementation: str = "grouped_mm", seed: int = 0) -> Any:
    """4 experts a layer (8 in OLMoE); gpt_oss keeps its matrices transposed and has a bias for each."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "mixtral":
            model: Any = MixtralForCausalLM(MixtralConfig(**_COMMON, intermediate_size=48, num_local_experts=4))
        elif kind == "olmoe":
            model = OlmoeForCausalLM(OlmoeConfig(**_COMMON, intermediate_size=16, num_experts=8))
        else:
            config = GptOssConfig(**_COMMON, intermediate_size=32, head_dim=8, num_local_experts=4)
            model = GptOssForCausalLM(config)
            for name, parameter in model.named_parameters():
                if name.endswith("_bias"):
                    nn.init.normal_(parameter, std=0.1)
    model.set_experts_implementation(implementation)
    return model.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, without PEFT's prefix and the adapter's name."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train(model: nn.Module, ids: Tensor, *, steps: int = 3, lr: float = 1e-2) -> list[float]:
    """AdamW with weight decay, as the Trainer's default is; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_gradients_are_those_of(model: PeftModel, unfrozen: nn.Module) -> int:
    """Compares the copies' gradients with the slices of a fully unfrozen model's; returns how many entries."""
    whole = dict(unfrozen.named_parameters())
    entries = 0
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, CondFTLayer):
            for parameter, slices, copy in layer.parts_of("default"):
                expected = whole[f"{path}.{parameter}"].grad
                assert expected is not None
                assert copy.grad is not None
                part = expected if slices is None else slices.take(expected)
                torch.testing.assert_close(copy.grad, part, rtol=1e-5, atol=1e-7)
                entries += copy.numel()
    return entries


def check_life_cycle(model: PeftModel, base: nn.Module, ids: Tensor) -> None:
    """Checks logits and base weights bit for bit: disabled, merged, unmerged and unloaded."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reference, adapted = logits(base, ids), logits(model, ids)
    assert not torch.equal(adapted, reference)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), reference)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, ids), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), reference)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), adapted)
    plain = model.unload()
    assert torch.equal(logits(plain, ids), reference)
    after = plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
