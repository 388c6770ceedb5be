"""Single attention heads: rows of q, k and v, columns of o; and the biases that go with them."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from condft import CondFTConfig, analyze, select_units
from tests.helpers.models.tiny_llama import VOCABULARY, build_tiny_llama
from tests.helpers.models.tiny_models import check_gradients_are_those_of, check_life_cycle, logits, train, trainable

HEAD = "model.layers.{}.self_attn.{}_proj.weight[h{}]"


def tiny(kind: str) -> Any:
    """Llama has no biases, Qwen2 some at q, k and v, GPT-2 one at each Conv1D, with q, k and v fused."""
    if kind == "llama":
        return build_tiny_llama()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        if kind == "qwen2":
            model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, intermediate_size=48))
        else:
            model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


UNITS = {
    "llama": [HEAD.format(0, "q", 3), HEAD.format(0, "q", 1), HEAD.format(1, "v", 0), HEAD.format(1, "o", 2)],
    "qwen2": [HEAD.format(0, "q", 2), HEAD.format(0, "k", 1), "model.layers.1.self_attn.v_proj.weight"],
    "gpt2": [
        "transformer.h.0.attn.c_attn.weight[q1]",
        "transformer.h.0.attn.c_attn.weight[v3]",
        "transformer.h.1.attn.c_proj.weight[h2]",
        "transformer.h.1.mlp.c_fc.weight",
    ],
}


def adapted(base: nn.Module, units: list[str], **options: Any) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), CondFTConfig(target_units=units, **options))


@pytest.mark.parametrize("bias", ["none", "selected"])
@pytest.mark.parametrize("kind", UNITS)
def test_trains_as_the_unfrozen_weight_would(kind: str, bias: str, token_ids: Tensor) -> None:
    base = tiny(kind)
    model = adapted(base, UNITS[kind], bias=bias)
    assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    for each in (base, model):
        each(input_ids=token_ids, labels=token_ids).loss.backward()
    entries = check_gradients_are_those_of(model, base)
    assert entries == sum(p.numel() for p in trainable(model).values())


@pytest.mark.parametrize("bias", ["none", "selected"])
@pytest.mark.parametrize("kind", UNITS)
def test_life_cycle(kind: str, bias: str, token_ids: Tensor, tmp_path: Any) -> None:
    base = tiny(kind)
    model = adapted(base, UNITS[kind], bias=bias)
    losses = train(model, token_ids, steps=4)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    check_life_cycle(model, base, token_ids)


@pytest.mark.parametrize("kind", UNITS)
def test_merged_is_adapted_under_autocast_too(kind: str, token_ids: Tensor) -> None:
    model = adapted(tiny(kind), UNITS[kind], bias="selected", init_weights=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted_logits = logits(model, token_ids)
        model.merge_adapter()
        assert torch.equal(logits(model, token_ids), adapted_logits)


def test_compiles_without_graph_breaks(token_ids: Tensor) -> None:
    model = adapted(tiny("llama"), UNITS["llama"])
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        run(input_ids=token_ids, labels=token_ids).loss.backward()
        grads.append([parameter.grad for parameter in trainable(model).values()])
        model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1])


@settings(max_examples=8)
@given(st.data())
def test_any_heads_of_one_layer(data: st.DataObject) -> None:
    """Only the chosen heads change, through AdamW with weight decay."""
    base = build_tiny_llama(layers=1)
    counts = {"q": 4, "k": 2, "v": 2, "o": 4}
    every = [HEAD.format(0, key, head) for key, count in counts.items() for head in range(count)]
    units = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    model = adapted(base, units)
    train(model, ids)
    merged = dict(model.merge_and_unload().named_parameters())
    for name, parameter in base.named_parameters():
        heads, labels = [(parameter, merged[name])], [""]
        if "self_attn" in name:
            key = name.rpartition("_proj")[0][-1]
            dim = 1 if key == "o" else 0
            heads = list(zip(parameter.split(8, dim), merged[name].split(8, dim), strict=True))
            labels = [f"[h{head}]" for head in range(counts[key])]
        for label, (before, after) in zip(labels, heads, strict=True):
            assert torch.equal(before, after) == (f"{name}{label}" not in units), f"{name}{label}"


def test_heads_are_chosen_when_asked_for() -> None:
    base = build_tiny_llama()
    expected = select_units(analyze(base, granularity="head", progress=False), num_tensors=20)
    config = CondFTConfig(num_tensors=20, granularity="head")
    get_peft_model(base, config)
    assert config.target_units == list(expected.names)
    assert any("[h" in name for name in expected.names)
    report = analyze(build_tiny_llama(), granularity="head", progress=False)
    given_report = CondFTConfig(num_tensors=20, granularity="head", report=report)
    get_peft_model(build_tiny_llama(), given_report)
    assert given_report.target_units == config.target_units


def test_a_report_of_whole_tensors_cannot_choose_heads() -> None:
    report = analyze(build_tiny_llama(), progress=False)
    with pytest.raises(ValueError, match=r"candidate weights have no row in it.*granularity='head'"):
        get_peft_model(build_tiny_llama(), CondFTConfig(num_tensors=20, granularity="head", report=report))


def test_biases_follow_the_rows_and_not_the_columns() -> None:
    shapes = {
        name.removeprefix("transformer.h."): tuple(parameter.shape)
        for name, parameter in trainable(adapted(tiny("gpt2"), UNITS["gpt2"], bias="selected")).items()
    }
    assert shapes == {
        "0.attn.c_attn.condft_weight": (32, 16),
        "0.attn.c_attn.condft_bias": (16,),
        "1.attn.c_proj.condft_weight": (8, 32),
        "1.mlp.c_fc.condft_weight": (32, 128),
        "1.mlp.c_fc.condft_bias": (128,),
    }


def test_adapters_with_and_without_biases(token_ids: Tensor) -> None:
    base = tiny("gpt2")
    model = adapted(base, UNITS["gpt2"])
    train(model, token_ids)
    first = logits(model, token_ids)
    model.add_adapter("other", CondFTConfig(target_units=UNITS["gpt2"][1:], bias="selected"))
    model.set_adapter("other")
    train(model, token_ids)
    second = logits(model, token_ids)
    model.set_adapter("default")
    assert torch.equal(logits(model, token_ids), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, token_ids), second)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["model.layers.0.mlp.up_proj.weight[h0]"], r"does not divide into heads \(it is not attention's\)"),
        ([HEAD.format(0, "k", 2)], r"its 2 heads are \[h0\] to \[h1\]"),
        ([HEAD.format(0, "k", 1), "model.layers.0.self_attn.k_proj.weight"], "as a whole and in 1 slices too"),
        (["model.embed_tokens.weight[h0]"], "Embedding cannot be sliced: name 'model.embed_tokens.weight'"),
    ],
)
def test_heads_that_cannot_be_trained_are_told(units: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(build_tiny_llama(), units)


@pytest.mark.parametrize(("name", "value"), [("granularity", "row"), ("bias", "all")])
def test_unknown_choices_are_told(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}' is unknown: choose one of"):
        CondFTConfig(**{name: value})
