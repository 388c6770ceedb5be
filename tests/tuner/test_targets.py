"""From the name of a unit to the module that is wrapped, and to the part of it that trains."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from condft import CondFTConfig
from condft.report import Role
from condft.tuner.layers.experts.layer import ExpertsLayer
from condft.tuner.layers.functional import FunctionalLayer
from condft.tuner.layers.slices import Slices
from condft.tuner.layers.substitution import CustomForwardLayer, SubstitutingLayer
from condft.tuner.targets import Target, Targets, layer_class, parameter_of
from condft.weights.walk import Unit, iter_units
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe

Q = "model.layers.0.self_attn.q_proj"
STACK = "model.layers.1.mlp.experts.down_proj"
HEADS = [f"{Q}.weight[h{index}]" for index in range(4)]


class Patched(nn.Linear):
    def forward(self, values: Any) -> Any:
        return super().forward(values)


def test_weights_heads_and_experts_are_found() -> None:
    llama, moe = Targets(build_tiny_llama()), Targets(tiny_moe())
    assert llama.find(f"{Q}.weight") == Target(Q, "weight", None, (Q,))
    assert llama.find(HEADS[2]) == Target(Q, "weight", Slices(0, ((16, 24),)), (Q,))
    path = STACK.rpartition(".")[0]
    assert moe.find(f"{STACK}[3]") == Target(path, "down_proj", Slices(0, ((3, 4),)), (path, STACK))


def test_every_unit_of_a_walk_is_found_in_the_model_and_around_an_adapter() -> None:
    for build in (build_tiny_llama, tiny_moe):
        for granularity in ("tensor", "head"):
            model = build()
            units = [item for item in iter_units(model, granularity=granularity) if isinstance(item, Unit)]
            plain = {unit.name: Targets(model).find(unit.name) for unit in units}
            for unit in units:
                target = plain[unit.name]
                assert isinstance(target, Target) is (unit.role is not Role.ROUTER)  # Mixtral's is no nn.Linear
                if not isinstance(target, Target):
                    continue
                values = model.get_submodule(target.path).get_parameter(target.parameter)
                part = values if target.slices is None else target.slices.take(values)
                assert part.reshape(unit.tensor.shape).equal(unit.tensor)
            wrapped = get_peft_model(model, CondFTConfig(num_tensors=3))
            assert {unit.name: Targets(wrapped).find(unit.name) for unit in units} == plain


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        ("model.norm.weight", "cannot train weight of a LlamaRMSNorm"),
        (f"{Q}.weight[h4]", r"its 4 heads are \[h0\] to \[h3\]"),
        ("model.layers.0.mlp.up_proj.weight[h0]", "does not divide into heads .*to train all of it"),
    ],
)
def test_what_cannot_train_is_refused_with_its_reason(unit: str, reason: str) -> None:
    targets = Targets(build_tiny_llama())
    assert isinstance(targets.find(unit), str)
    with pytest.raises(ValueError, match=reason):
        targets.plan([unit], bias=False)


def test_what_is_not_there_is_none() -> None:
    targets = Targets(build_tiny_llama())
    assert targets.find("model.layers.9.mlp.up_proj.weight") is None
    assert targets.find(f"{Q}.bias") is None
    assert not targets.has("model.layers.9")
    with pytest.raises(ValueError, match="the model has no such parameter"):
        targets.plan(["nothing.weight"], bias=False)
    with pytest.raises(ValueError, match=r"stack of 4 matrices, name one as .*\[0\] to .*\[3\]"):
        Targets(tiny_moe()).plan([f"{STACK}[4]"], bias=False)


@given(chosen=st.lists(st.sampled_from(HEADS), min_size=1, unique=True))
def test_heads_of_one_weight_are_joined_in_any_order(chosen: list[str]) -> None:
    targets = Targets(_LLAMA)
    plan = targets.plan(chosen, bias=False)
    assert plan.keys() == {Q}
    slices = plan[Q]["weight"]
    assert slices is not None
    rows = [row for start, stop in slices.runs for row in range(start, stop)]
    expected = sorted(row for name in chosen for row in range(8 * HEADS.index(name), 8 * HEADS.index(name) + 8))
    assert rows == expected
    assert all(before[1] < after[0] for before, after in zip(slices.runs, slices.runs[1:], strict=False))


_LLAMA = build_tiny_llama()


def test_a_unit_is_named_once_and_never_whole_and_in_part() -> None:
    targets = Targets(_LLAMA)
    with pytest.raises(ValueError, match="1 units are named twice"):
        targets.plan([HEADS[0], HEADS[0]], bias=False)
    with pytest.raises(ValueError, match="as a whole and in 1 slices too"):
        targets.plan([HEADS[0], f"{Q}.weight"], bias=False)


def test_biases_belong_to_the_outputs_that_a_unit_computes() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 3), "plain": nn.Linear(4, 3, bias=False)})
    plan = Targets(model).plan(["linear.weight", "plain.weight"], bias=True)
    assert plan == {"linear": {"weight": None, "bias": None}, "plain": {"weight": None}}
    experts = Targets(tiny_moe("gpt_oss")).plan([f"{STACK}[1]", f"{STACK}[2]"], bias=True)
    assert experts == {
        STACK.rpartition(".")[0]: {"down_proj": Slices(0, ((1, 3),)), "down_proj_bias": Slices(0, ((1, 3),))}
    }
    attention = Targets(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4)}))
    parts = attention.plan(["attention.q_proj_weight"], bias=True)["attention"]
    assert parts == {"q_proj_weight": None, "in_proj_bias": Slices(0, ((0, 8),))}


def test_the_wrapper_follows_from_the_module() -> None:
    assert layer_class(nn.Linear(3, 2)) is FunctionalLayer
    assert layer_class(Patched(3, 2)) is CustomForwardLayer
    assert layer_class(nn.MultiheadAttention(4, 2)) is SubstitutingLayer
    assert layer_class(tiny_moe().get_submodule(STACK.rpartition(".")[0])) is ExpertsLayer
    patched = nn.Linear(3, 2)
    patched.forward = lambda values: values  # type: ignore[method-assign]
    assert layer_class(patched) is CustomForwardLayer


def test_parameters_and_wrappers_by_canonical_path() -> None:
    assert parameter_of(f"{STACK}[17]") == STACK
    model = get_peft_model(build_tiny_llama(), CondFTConfig(target_units=[f"{Q}.weight"]))
    targets = Targets(model)
    assert targets.wrapper(Q) is model.get_submodule(f"base_model.model.{Q}")
    assert isinstance(targets.module(Q), nn.Linear)
    assert targets.wrapper(Q.replace("q_proj", "k_proj")) is None
