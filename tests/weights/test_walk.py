"""What the walk yields and skips, and under which names and roles."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from condft import SpectralReport, analyze
from condft.report import Role, SkippedWeight, SkipReason
from condft.weights.walk import Unit, iter_units
from tests.helpers.processes import WORKERS


def walk(model: nn.Module) -> tuple[dict[str, Unit], dict[str, SkippedWeight]]:
    items = list(iter_units(model))
    units = {item.name: item for item in items if isinstance(item, Unit)}
    return units, {item.name: item for item in items if isinstance(item, SkippedWeight)}


def test_llama_units_roles_and_ties(tiny_llama):
    units, skipped = walk(tiny_llama())
    assert sum(unit.role is Role.LAYER for unit in units.values()) == 4 * 7
    assert units["model.embed_tokens.weight"].role is Role.EMBEDDING
    assert units["model.layers.3.self_attn.q_proj.weight"].module_type == "model.layers.*.self_attn.q_proj"
    assert skipped["lm_head.weight"].reason is SkipReason.TIED
    assert "model.embed_tokens.weight" in skipped["lm_head.weight"].detail
    assert skipped["model.norm.weight"].reason is SkipReason.FEWER_THAN_TWO_DIMENSIONS


def test_an_untied_head_is_a_head(tiny_llama):
    units, _ = walk(tiny_llama(tied=False))
    assert units["lm_head.weight"].role is Role.OUTPUT_HEAD


def test_every_parameter_comes_once(tiny_llama):
    model = tiny_llama()
    units, skipped = walk(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert names == units.keys() | skipped.keys()
    assert not units.keys() & skipped.keys()


def test_moe_stacks_come_expert_by_expert_and_routers_are_marked():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=32,
    )
    model = MixtralForCausalLM(config)
    units, _ = walk(model)
    experts = model.model.layers[0].mlp.experts
    unit = units["model.layers.0.mlp.experts.gate_up_proj[2]"]
    assert torch.equal(unit.matrix, experts.gate_up_proj[2])
    assert unit.role is Role.EXPERT
    assert unit.module_type == "model.layers.*.mlp.experts.gate_up_proj"
    assert sum(u.role is Role.EXPERT for u in units.values()) == 2 * 3
    assert units["model.layers.0.mlp.gate.weight"].role is Role.ROUTER


def test_layer_kinds_and_their_matrices():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 5, (2, 4)),
            "conv1d": Conv1D(6, 4),
            "emb": nn.Embedding(7, 3),
            "score": nn.Linear(4, 2),
            "free": nn.ParameterList([nn.Parameter(torch.ones(2, 3))]),
        }
    )
    units, _ = walk(model)
    assert units["conv.weight"].matrix.shape == (5, 24)
    assert (units["conv.weight"].role, units["conv1d.weight"].role) == (Role.LAYER, Role.LAYER)
    assert units["emb.weight"].role is Role.EMBEDDING
    assert units["score.weight"].role is Role.OUTPUT_HEAD
    assert units["free.0"].role is Role.PARAMETER


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False), SkipReason.NOT_FLOATING),
        (nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)), SkipReason.NOT_FLOATING),
        (nn.Parameter(torch.zeros(2, 2, device="meta")), SkipReason.META_DEVICE),
        (nn.Parameter(torch.zeros(0, 2)), SkipReason.EMPTY),
        (nn.Parameter(torch.zeros(5)), SkipReason.FEWER_THAN_TWO_DIMENSIONS),
    ],
)
def test_skips_are_data(parameter, reason):
    model = nn.Module()
    model.odd = parameter
    assert walk(model)[1]["odd"].reason is reason


def test_a_parametrized_weight_counts_by_its_effective_value():
    model = nn.Sequential(nn.Linear(4, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    units, skipped = walk(model)
    assert torch.equal(units["0.weight"].tensor, model[0].weight)
    assert {skip.reason for skip in skipped.values()} == {
        SkipReason.ADAPTER,
        SkipReason.FEWER_THAN_TWO_DIMENSIONS,
    }


def test_a_stack_of_bias_vectors_is_no_matrix() -> None:
    """GPT-OSS keeps the biases of its experts as one 2-D parameter a projection."""
    config = GptOssConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        vocab_size=32,
        pad_token_id=0,
    )
    units, skipped = walk(GptOssForCausalLM(config))
    assert units["model.layers.0.mlp.experts.gate_up_proj[2]"].matrix.shape == (16, 48)
    skip = skipped["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert (skip.reason, skip.detail) == (SkipReason.FEWER_THAN_TWO_DIMENSIONS, "a stack of bias vectors")


def test_adapters_are_invisible(tiny_llama):
    """The base weights of a LoRA model keep their names; the adapter's own are skipped as such."""
    plain, _ = walk(tiny_llama())
    wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    units, skipped = walk(wrapped)
    assert units.keys() == plain.keys()
    assert {name: unit.role for name, unit in units.items()} == {name: unit.role for name, unit in plain.items()}
    assert sum(skip.reason is SkipReason.ADAPTER for skip in skipped.values()) == 4 * 2 * 2


def test_parametrized_weights_do_not_tie_by_chance() -> None:
    """Effective weights are made anew at each look, so that two may get the same id one after the other."""
    model = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)) for _ in range(20)))
    names = []
    for item in iter_units(model):  # nothing keeps the units alive here
        names.append(item.name if isinstance(item, Unit) else "")
    assert [name for name in names if name] == [f"{i}.weight" for i in range(20)]


@pytest.mark.multiprocess
def test_sharded_weights_are_gathered_one_at_a_time(tiny_llama: Any, tmp_path: Path) -> None:
    """Two gloo ranks under FSDP2 find what one process finds, on every rank."""
    model = tiny_llama(layers=2)
    model.save_pretrained(tmp_path)
    script = WORKERS / "units.py"
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for granularity in ("tensor", "head"):
        expected = analyze(model, granularity=granularity, progress=False)
        first, second = (SpectralReport.load(tmp_path / f"{granularity}-{rank}.json") for rank in range(2))
        assert first == second
        assert first.fingerprint == expected.fingerprint  # the same names and bytes
