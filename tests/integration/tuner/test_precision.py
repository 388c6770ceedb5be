"""fp32 master copies over half-precision bases, with autocast and without, for every kind of unit."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, train, trainable

HALVES = [torch.bfloat16, torch.float16]
UNITS = {
    "layers": ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"],
    "embedding": ["model.embed_tokens.weight", "lm_head.weight"],
    "heads": ["model.layers.1.self_attn.q_proj.weight[h1]", "model.layers.2.self_attn.o_proj.weight[h0]"],
    "experts": [f"model.layers.0.mlp.experts.{name}[{i}]" for name in ("gate_up_proj", "down_proj") for i in (0, 2)],
}


def adapted(units: str, dtype: torch.dtype, **options: Any) -> tuple[Any, PeftModel]:
    """A base, and another one with an adapter on it."""
    base, other = (tiny_moe() if units == "experts" else build_tiny_llama(tied=False) for _ in range(2))
    return base.to(dtype), get_peft_model(other.to(dtype), CondFTConfig(target_units=UNITS[units]), **options)


def moved_by_one_step(model: PeftModel, ids: Tensor, lr: float, autocast: torch.dtype | None = None) -> float:
    """Which part of the entries that have a gradient an AdamW step changes."""
    copies = list(trainable(model).values())
    before = [p.detach().clone() for p in copies]
    optimizer = torch.optim.AdamW(copies, lr=lr, weight_decay=0.0)
    with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    # Rows of tokens that do not occur get no gradient, and no step.
    touched = torch.cat([(p.grad != 0).flatten() for p in copies])
    optimizer.step()
    changed = torch.cat([(p != b).flatten() for p, b in zip(copies, before, strict=True)])
    assert touched.any()
    return float((changed & touched).sum() / touched.sum())


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_copies_are_moved_by_small_steps(
    units: str, dtype: torch.dtype, autocast: bool, token_ids: Tensor
) -> None:
    base, model = adapted(units, dtype)
    copies = trainable(model)
    assert {p.dtype for p in copies.values()} == {torch.float32}
    assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    assert moved_by_one_step(model, token_ids, 1e-5, dtype if autocast else None) > 0.95
    assert {p.grad.dtype for p in copies.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "condft" not in n} == {dtype}


@pytest.mark.parametrize("units", UNITS)
def test_without_the_cast_the_copies_have_the_bases_dtype_and_lose_small_steps(units: str, token_ids: Tensor) -> None:
    base, model = adapted(units, torch.bfloat16, autocast_adapter_dtype=False)
    assert {p.dtype for p in trainable(model).values()} == {torch.bfloat16}
    assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    assert moved_by_one_step(model, token_ids, 1e-5) < 0.5


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_it_is_respected_when_loading(autocast_adapter_dtype: bool, tmp_path: Path) -> None:
    _, model = adapted("layers", torch.bfloat16, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    base = build_tiny_llama(tied=False).bfloat16()
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for n, p in loaded.named_parameters() if "condft" in n}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}


@pytest.mark.parametrize("units", UNITS)
def test_transformers_own_adapters_have_fp32_copies_too(units: str, token_ids: Tensor, tmp_path: Path) -> None:
    base, like = adapted(units, torch.bfloat16)
    base.add_adapter(CondFTConfig(target_units=UNITS[units]))
    assert {p.dtype for p in trainable(base).values()} == {torch.float32}
    assert moved_by_one_step(base, token_ids, 1e-5) > 0.95
    trained = {name: p.detach().clone() for name, p in trainable(base).items()}
    base.save_pretrained(tmp_path)
    loaded = like.unload()
    loaded.load_adapter(tmp_path)
    kept = {n.removesuffix(".default"): p for n, p in loaded.named_parameters() if "condft" in n}
    assert kept.keys() == trained.keys()
    assert all(torch.equal(p, trained[name]) for name, p in kept.items())


@pytest.mark.parametrize("units", UNITS)
def test_what_is_loaded_for_inference_is_frozen(units: str, tmp_path: Path) -> None:
    """Also where the copies are cast to fp32, for which PEFT puts new parameters in place."""
    _, model = adapted(units, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert not trainable(loaded)
    loaded.load_adapter(tmp_path, "second", is_trainable=False)
    assert not trainable(loaded)
    loaded.load_adapter(tmp_path, "third", is_trainable=True)
    loaded.set_adapter("third")
    assert all(name.endswith(".third") for name in trainable(loaded))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_fp32_copies_over_bf16_survive_saving_bit_for_bit(
    token_ids: Tensor, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    _, model = adapted("layers", torch.bfloat16)
    train(model, token_ids, lr=1e-4)
    model.save_pretrained(tmp_path)
    base = build_tiny_llama(tied=False).bfloat16()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    mine = {n: p for n, p in model.named_parameters() if "condft" in n}
    assert all(torch.equal(p, mine[n]) for n, p in loaded.named_parameters() if "condft" in n)


@pytest.mark.parametrize("units", UNITS)
def test_under_autocast_merged_is_adapted(units: str, token_ids: Tensor) -> None:
    _, model = adapted(units, torch.bfloat16)
    train(model, token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model, token_ids)
        model.merge_adapter()
        assert torch.equal(logits(model, token_ids), before)
