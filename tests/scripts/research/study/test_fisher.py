"""Selections by gradients: experts by their slices, and that what is cheapest to train is chosen."""

from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM

from condft import add_fisher_information, analyze
from condft.report import Role
from scripts.research.gradients import adam_directions, fisher_information, language_loss
from scripts.research.study.fisher import least_cost_at_equal_gain
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe

TOKENS = torch.arange(48).reshape(4, 12) % 31


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build_tiny_llama(layers=2).requires_grad_(False)


def test_an_experts_direction_and_curvature_are_its_slice_of_the_stacks() -> None:
    model = tiny_moe().requires_grad_(False)
    stack = next(name for name, parameter in model.named_parameters() if parameter.ndim == 3)
    losses = [partial(language_loss, model, batch) for batch in TOKENS.split(2)]
    names = [stack, *(f"{stack}[{index}]" for index in range(len(model.get_parameter(stack))))]
    whole, *experts = (adam_directions(model, names, losses)[name] for name in names)
    assert sum(expert["gradient_norm"] ** 2 for expert in experts) == pytest.approx(whole["gradient_norm"] ** 2)
    expert = next(expert for expert in experts if expert["gradient_norm"] > 0)
    index = experts.index(expert)
    part = whole["direction"][index]
    torch.testing.assert_close(expert["direction"], part / part.norm())
    directions = {name: facts["direction"] for name, facts in zip(names[1:], experts, strict=True)}
    fisher = fisher_information(model, {stack: whole["direction"], **directions}, TOKENS)
    assert sum(fisher[name][0] for name in names[1:]) == pytest.approx(fisher[stack][0])
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_the_cheapest_of_each_type_are_chosen(llama: LlamaForCausalLM) -> None:
    names = [name for name, _ in llama.named_parameters() if "layers." in name and "norm" not in name]
    report = analyze(llama, names=names, progress=False)
    assert all(row.role is Role.LAYER for row in report.rows)
    losses = [partial(language_loss, llama, batch) for batch in TOKENS.split(2)]
    chosen = least_cost_at_equal_gain(llama, report, 0.5, TOKENS, losses)
    found = adam_directions(llama, names, losses)
    fisher = fisher_information(llama, {name: facts["direction"] for name, facts in found.items()}, TOKENS)
    cost = {name: fisher[name][1] / found[name]["slope"] ** 2 for name in names}
    for kind in {name.split(".")[-2] for name in names}:
        pair = sorted((name for name in names if name.split(".")[-2] == kind), key=cost.__getitem__)
        assert [name in chosen for name in pair] == [True, False], kind


def test_the_trace_is_condfts_own(llama: LlamaForCausalLM) -> None:
    names = [name for name, _ in llama.named_parameters() if "layers." in name and "norm" not in name]
    report = add_fisher_information(analyze(llama, names=names, progress=False), llama, TOKENS, progress=False)
    fisher = fisher_information(llama, {name: llama.get_parameter(name) for name in names}, TOKENS)
    for row in report.rows:
        assert row.fisher_information == pytest.approx(fisher[row.name][0] / row.num_parameters, rel=1e-5)
