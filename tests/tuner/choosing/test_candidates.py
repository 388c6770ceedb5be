"""Which units are in a config's scope, in PEFT's matching of names, and what is said if none is."""

from typing import Any

import pytest
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from condft import CondFTConfig
from condft.report import SkippedWeight, SkipReason
from condft.tuner.choosing.candidates import candidate_names, matches, no_candidates
from condft.tuner.targets import Targets
from condft.weights.walk import Unit, iter_units
from tests.helpers.models.tiny_models import tiny_moe


def candidates(model: nn.Module, **options: Any) -> set[str]:
    config = CondFTConfig(**options)
    items = iter_units(model, granularity=config.granularity)  # type: ignore[arg-type]
    units = {item.name: item for item in items if isinstance(item, Unit)}
    return candidate_names(config, model, units, Targets(model))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 28),
        ({"target_modules": "all-linear"}, 28),
        ({"target_modules": ["q_proj"]}, 4),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, 1),
        ({"target_modules": r".*\.mlp\.(up|gate)_proj"}, 8),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 4),
        ({"layers_to_transform": [0, 3]}, 14),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, 1),
        ({"target_modules": ["q_proj"], "granularity": "head"}, 16),
        ({"include_roles": ["output_head"]}, 29),
        ({"target_modules": ["lm_head", "embed_tokens"]}, 2),
        ({"target_modules": ".*"}, 28),  # a pattern that matches the head does not mean it
        ({"target_modules": ["nothing"]}, 0),
    ],
)
def test_the_scope_of_a_llama(tiny_llama: Any, options: dict[str, Any], count: int) -> None:
    assert len(candidates(tiny_llama(tied=False), **options)) == count


def test_experts_are_candidates_one_by_one_and_the_router_is_not() -> None:
    model = tiny_moe()
    found = candidates(model, target_modules=["experts"])
    assert found == {
        f"model.layers.{layer}.mlp.experts.{stack}[{expert}]"
        for layer in range(2)
        for stack in ("gate_up_proj", "down_proj")
        for expert in range(4)
    }
    everything = candidates(model)
    assert {name for name in everything - found if "self_attn" not in name} == set()


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"include_roles": ["embedding"]}])
def test_a_tied_weight_in_scope_is_refused_under_both_names(tiny_llama: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is tied to"):
        candidates(tiny_llama(), **options)
    assert len(candidates(tiny_llama())) == 28


def test_matching_is_peft_s_own() -> None:
    by_suffix = CondFTConfig(target_modules=["q_proj"], exclude_modules=["layers.1.q_proj"])
    assert matches(by_suffix, "layers.0.q_proj")
    assert not matches(by_suffix, "layers.0.not_q_proj")
    assert isinstance(matches(by_suffix, "layers.1.q_proj"), _ExcludedModule)
    by_layer = CondFTConfig(layers_to_transform=[2], layers_pattern="blocks")
    assert matches(by_layer, "blocks.2.proj")
    assert not matches(by_layer, "blocks.1.proj")
    assert not matches(by_layer, "proj")  # in no layer
    assert matches(CondFTConfig(), "anything")


def test_the_message_names_what_is_near_and_what_is_quantized() -> None:
    names = ["model.q_proj.weight", "model.up_proj.weight"]
    packed = [SkippedWeight("model.down_proj.weight", (4, 4), SkipReason.QUANTIZED, "4 bits")]
    near = no_candidates(CondFTConfig(target_modules=["q_prj"]), names, [])
    assert "matches none of the 2 modules with a weight. 'q_prj' is near q_proj" in near
    far = no_candidates(CondFTConfig(target_modules=["xyz"]), names, packed)
    assert "Module names end in q_proj, up_proj." in far
    assert far.endswith("1 weights are quantized and cannot be trained, the first is model.down_proj.weight (4 bits).")
    assert "the model has no weight that CondFT can train" in no_candidates(CondFTConfig(), [], packed)
