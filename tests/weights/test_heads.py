"""Attention weights head by head: the slices are those that the model's own attention reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from condft import analyze
from condft.report import SkippedWeight, SkipReason
from condft.weights.unit import Unit
from condft.weights.walk import iter_units

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
DEEPSEEK = DeepseekV3Config(
    **{**SMALL, "num_key_value_heads": 4},
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    qk_nope_head_dim=4,
    first_k_dense_replace=1,
)


def by_head(model: nn.Module) -> tuple[dict[str, Unit], dict[str, str]]:
    """Units by name, and the reasons of the attention weights that stay whole."""
    items = list(iter_units(model, granularity="head"))
    whole = {s.name: s.detail for s in items if isinstance(s, SkippedWeight) and s.reason is SkipReason.NOT_SPLIT}
    return {item.name: item for item in items if isinstance(item, Unit)}, whole


def named(units: dict[str, Unit], part: str) -> list[str]:
    return [name.rpartition("[")[2].removesuffix("]") for name in units if part in name and "[" in name]


def test_grouped_query_attention(tiny_llama: Any) -> None:
    model = tiny_llama()
    units, whole = by_head(model)
    path = "model.layers.2.self_attn"
    attention = model.model.layers[2].self_attn
    assert named(units, f"{path}.q_proj") == named(units, f"{path}.o_proj") == ["h0", "h1", "h2", "h3"]
    assert named(units, f"{path}.k_proj") == named(units, f"{path}.v_proj") == ["h0", "h1"]
    assert torch.equal(units[f"{path}.q_proj.weight[h3]"].matrix, attention.q_proj.weight[24:32])
    assert torch.equal(units[f"{path}.v_proj.weight[h1]"].matrix, attention.v_proj.weight[8:16])
    assert torch.equal(units[f"{path}.o_proj.weight[h1]"].matrix, attention.o_proj.weight[:, 8:16])
    assert units[f"{path}.o_proj.weight[h1]"].module_type == "model.layers.*.self_attn.o_proj"
    assert "model.layers.2.mlp.up_proj.weight" in units
    assert not whole


def test_heads_make_up_the_whole_weight_and_zeroing_one_silences_it(tiny_llama: Any, token_ids: torch.Tensor) -> None:
    """A head's v rows zeroed, its o columns no longer matter: the two slices are of the same head."""
    model = tiny_llama(layers=1)
    units, _ = by_head(model)
    path = "model.layers.0.self_attn"
    q = torch.cat([units[f"{path}.q_proj.weight[h{i}]"].tensor for i in range(4)])
    assert torch.equal(q, model.model.layers[0].self_attn.q_proj.weight)
    with torch.no_grad():
        units[f"{path}.v_proj.weight[h1]"].tensor.zero_()  # read by the query heads 2 and 3
        before = model(token_ids).logits
        for head in (2, 3):
            units[f"{path}.o_proj.weight[h{head}]"].tensor.fill_(7.0)
        assert torch.equal(model(token_ids).logits, before)
        units[f"{path}.o_proj.weight[h1]"].tensor.fill_(7.0)
        assert not torch.equal(model(token_ids).logits, before)


def test_a_head_dim_of_its_own() -> None:
    units, whole = by_head(Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)))
    assert units["model.layers.0.self_attn.q_proj.weight[h3]"].tensor.shape == (16, 32)
    assert units["model.layers.0.self_attn.o_proj.weight[h3]"].tensor.shape == (32, 16)
    assert not whole


def test_gpt2s_fused_conv1d() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40, add_cross_attention=True))
    units, whole = by_head(model)
    block = model.transformer.h[0]
    path = "transformer.h.0.attn"
    q, k, v = block.attn.c_attn.weight.split(32, dim=1)  # as GPT2Attention.forward splits its output
    assert torch.equal(units[f"{path}.c_attn.weight[q1]"].matrix, q[:, 8:16])
    assert torch.equal(units[f"{path}.c_attn.weight[k0]"].matrix, k[:, :8])
    assert torch.equal(units[f"{path}.c_attn.weight[v3]"].matrix, v[:, 24:])
    assert torch.equal(units[f"{path}.c_proj.weight[h2]"].matrix, block.attn.c_proj.weight[16:24])
    assert units[f"{path}.c_attn.weight[k0]"].module_type == "transformer.h.*.attn.c_attn.k"
    cross = named(units, "crossattention.c_attn")
    assert (cross[0], cross[-1], len(cross)) == ("k0", "v3", 8)
    assert len(named(units, "crossattention.q_attn")) == 4
    assert "transformer.h.0.mlp.c_proj.weight" in units
    assert not whole


def test_phi3s_fused_projection() -> None:
    model = Phi3ForCausalLM(Phi3Config(**SMALL))
    units, whole = by_head(model)
    path = "model.layers.0.self_attn.qkv_proj"
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    assert named(units, path) == ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    assert torch.equal(units[f"{path}.weight[k1]"].matrix, weight[40:48])
    assert torch.equal(units[f"{path}.weight[v0]"].matrix, weight[48:56])
    assert not whole


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)),
            ["query", "key", "value"],
        ),
        (
            T5ForConditionalGeneration(
                T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=40)
            ),
            "qkvo",
        ),
    ],
)
def test_other_names_for_the_projections(model: nn.Module, expected: str | list[str]) -> None:
    units, _ = by_head(model)
    for name in expected:
        assert {"h0", "h1", "h2", "h3"} == set(named(units, f".{name}.weight"))


def test_interleaved_and_latent_attention_stay_whole_with_a_reason() -> None:
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=32)
    )
    units, whole = by_head(neox)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert name in units
    assert "query_key_value of GPTNeoXAttention is not known" in whole[f"{name}[h*]"]
    units, whole = by_head(DeepseekV3ForCausalLM(DEEPSEEK))
    assert "model.layers.0.self_attn.kv_b_proj.weight" in units
    assert "model.layers.0.self_attn.kv_b_proj.weight[h*]" in whole
    assert units["model.layers.0.self_attn.o_proj.weight[h3]"].tensor.shape == (32, 8)  # v_head_dim, not head_dim


def test_a_size_that_contradicts_the_config_stays_whole(tiny_llama: Any) -> None:
    model = tiny_llama(layers=1)
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 40, bias=False)
    units, whole = by_head(model)
    assert "model.layers.0.self_attn.q_proj.weight" in units
    assert whole["model.layers.0.self_attn.q_proj.weight[h*]"] == "40 rows are not 4 heads of 8"


def test_adapters_do_not_hide_the_heads(tiny_llama: Any) -> None:
    plain, _ = by_head(tiny_llama())
    wrapped, _ = by_head(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "o_proj"])))
    assert wrapped.keys() == plain.keys()


def test_streamed_heads_are_the_live_ones(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    live = analyze(model, granularity="head", progress=False)
    stored = analyze(tmp_path, granularity="head", progress=False)
    assert stored.rows == live.rows
    assert len(live.rows) == 4 * (4 + 2 + 2 + 4 + 3) + 1


def test_another_granularity_is_an_error(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="granularity is one of tensor, head, not 'row'"):
        analyze(tiny_llama(), granularity="row")  # type: ignore[arg-type]
