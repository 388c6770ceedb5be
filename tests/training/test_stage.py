"""Stages: which components learn, at which rates, and how the rate runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.training import RunConfig, Stage
from condft.training.stage import build_optimizer, only_components_of, rate_factor, stages_of, trainable_parameters


def test_stages_of_a_config(make_config: Callable[..., RunConfig]) -> None:
    first, second = stages_of(make_config())
    assert (first.name, first.steps, set(first.learning_rate)) == ("projector", 3, {"projector"})
    assert (second.name, second.steps, set(second.learning_rate)) == ("adapt", 4, {"projector", "language_model"})
    assert stages_of(make_config(projector_steps=0)) == [second]
    assert stages_of(make_config(steps=0)) == [first]


def test_the_other_component_rests_and_comes_back(trainee: Any) -> None:
    model = trainee()
    before = list(trainable_parameters(model))
    with (
        pytest.raises(RuntimeError, match="within"),
        only_components_of(Stage("projector", 1, {"projector": 1e-3}, 0), model) as trained,
    ):
        assert trained
        assert all("multi_modal_projector" in name for name in trained)
        assert list(trainable_parameters(model)) == list(trained)
        raise RuntimeError("within")
    assert list(trainable_parameters(model)) == before


def test_a_component_without_parameters_is_an_error(trainee: Any) -> None:
    model = trainee()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    with (
        pytest.raises(ValueError, match=r"stage 'adapt' trains the language_model, but none .* \(4 elsewhere do\)"),
        only_components_of(Stage("adapt", 1, {"projector": 1e-3, "language_model": 1e-3}, 0), model),
    ):
        pass


def test_one_group_and_rate_a_component(trainee: Any) -> None:
    parameters = trainable_parameters(trainee())
    stage = Stage("adapt", 1, {"projector": 1e-3, "language_model": 1e-4}, 0)
    optimizer = build_optimizer(stage, parameters, weight_decay=0.1)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == list(stage.learning_rate.items())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters.values()}


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 200), st.integers(0, 50))
def test_no_step_stands_still_and_none_exceeds_the_peak(schedule: str, steps: int, warmup: int) -> None:
    factors = [rate_factor(schedule, step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 1


def test_known_factors() -> None:
    assert rate_factor("linear", 15, 20, 10) == pytest.approx(0.5)
    assert rate_factor("cosine", 15, 20, 10) == pytest.approx(0.5)
    assert rate_factor("constant", 19, 20, 10) == 1
    assert rate_factor("cosine", 4, 20, 10) == 0.5
    assert rate_factor("linear", 20, 20, 10) == 0  # LambdaLR asks once more after the last step
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        rate_factor("step", 11, 20, 10)


def test_trainable_parameters_are_those_with_requires_grad() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert list(trainable_parameters(layer)) == ["weight"]
