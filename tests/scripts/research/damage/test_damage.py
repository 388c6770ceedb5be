"""The single-tensor experiment: its order, its laws, its statistics, and that part of a forward is the whole one."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from condft.retention.measures import kl_to_base, text_cross_entropy
from scripts.research.damage.continuation import Continuation, FixedText
from scripts.research.damage.equal_gain import at_equal_gain, standardized_coefficients, thirds_ratio
from scripts.research.damage.run import Protocol, second_norm, spread_order
from scripts.research.gradients import adam_directions, fisher_information, language_loss
from scripts.research.statistics import (
    bootstrap_draws,
    partial_rank_correlation,
    percentile_interval,
    rank_correlation,
)

NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens(count: int, length: int = 12) -> torch.Tensor:
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(count))


def test_a_forward_from_a_layer_upwards_is_the_whole_forward(model: LlamaForCausalLM) -> None:
    window, part = tokens(3), Continuation(model)
    inputs = part.inputs_of_layers(window)
    whole = model(input_ids=window).logits
    for layer in range(4):
        torch.testing.assert_close(part.logits(part.final_hidden(inputs[layer], layer)), whole)


def test_a_changed_weight_is_measured_as_the_evaluation_module_measures_it(model: LlamaForCausalLM) -> None:
    class Characters:
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) - 32 for character in text]}

    window = tokens(4)
    text = "".join(chr(32 + token) for token in window.flatten().tolist())
    fixed = FixedText(Continuation(model), window, with_kl=True)
    weight, base = model.get_parameter(NAME), model.get_parameter(NAME).clone()

    def measured() -> float:
        return text_cross_entropy(model, Characters(), text, max_tokens=48, context_length=12).nats_per_token

    before = measured()
    assert fixed.cross_entropy == pytest.approx(before, rel=1e-5)
    weight.data.mul_(1.5)
    change = fixed.change(2)
    assert abs(change.cross_entropy) > 1e-3
    assert change.cross_entropy == pytest.approx(measured() - before, abs=1e-5)

    from contextlib import contextmanager

    @contextmanager
    def as_base():  # type: ignore[no-untyped-def]
        changed = weight.detach().clone()
        weight.data.copy_(base)
        yield
        weight.data.copy_(changed)

    assert change.kl == pytest.approx(kl_to_base(model, window, as_base), rel=1e-4)


def test_the_direction_lowers_the_loss_as_its_slope_says(model: LlamaForCausalLM) -> None:
    losses = [partial(language_loss, model, batch) for batch in tokens(8).split(2)]
    found = adam_directions(model, [NAME], losses)[NAME]
    fixed = FixedText(Continuation(model), tokens(8), with_kl=False)
    model.get_parameter(NAME).data.add_(found["direction"], alpha=1e-2)
    assert found["direction"].norm() == pytest.approx(1.0, rel=1e-5)
    assert 0 < found["slope"] <= found["gradient_norm"] * (1 + 1e-6)
    assert -fixed.change(2).cross_entropy == pytest.approx(found["slope"] * 1e-2, rel=0.1)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_fisher_information_predicts_the_divergence_of_a_small_step(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    own = torch.randint(64, (128, 1))
    for _ in range(7):
        own = torch.cat([own, torch.multinomial(model(input_ids=own).logits[:, -1].softmax(-1), 1)], dim=1)
    direction = torch.randn(32, 48)
    direction /= direction.norm()
    trace, along = fisher_information(model, {NAME: direction}, own)[NAME]
    fixed = FixedText(Continuation(model), own, with_kl=True)
    model.get_parameter(NAME).data.add_(direction, alpha=0.05)
    assert fixed.change(2).kl == pytest.approx(0.5 * along * 0.05**2, rel=0.4)  # 128 sequences: some 13 % of noise
    assert along < trace


def test_every_beginning_of_the_order_spreads_over_the_depth() -> None:
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in ("mlp.up", "self_attn.q")]
    order = spread_order(names)
    assert sorted(order) == sorted(names)
    for count in (4, 8, 16):
        layers = sorted(int(name.split(".")[2]) for name in order[: 2 * count : 2])
        assert max(np.diff([0, *layers, 30])) <= 2 * 30 / count


def test_the_second_norm_aims_at_the_equal_gain_and_stays_near() -> None:
    protocol = Protocol(relative_norm=0.02, equal_gain=0.01, narrowest=0.25, widest=4)
    assert second_norm(protocol, 0.005) == pytest.approx(0.04)
    assert second_norm(protocol, 1.0) == pytest.approx(0.005)
    assert second_norm(protocol, 1e-6) == second_norm(protocol, -0.01) == pytest.approx(0.08)


def test_equal_gain_is_read_between_points_and_by_the_law_of_small_updates_outside() -> None:
    points = [(0.04, 0.016), (0.01, 0.001)]
    assert at_equal_gain(points, 0.02, power=2) == pytest.approx(0.004)
    assert at_equal_gain(points, 0.005, power=2) == pytest.approx(0.00025)
    assert at_equal_gain(points, 0.08, power=1) == pytest.approx(0.032)
    assert at_equal_gain([(0.01, -0.002), (0.03, 0.0)], 0.03, power=1) == pytest.approx(0.0)
    assert at_equal_gain([(-0.01, 0.5), (0.0, 0.1)], 0.01, power=2) is None


def test_ranks_within_groups_ignore_what_sets_groups_apart() -> None:
    x, y = [1, 2, 3, 101, 102, 103], [13, 12, 11, 93, 92, 91]
    assert rank_correlation(x, y) > 0.5
    assert rank_correlation(x, y, list("aaabbb")) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_a_partial_correlation_takes_out_what_the_covariate_explains() -> None:
    generator = np.random.default_rng(0)
    depth = generator.normal(size=400)
    x, y = depth + 0.3 * generator.normal(size=400), depth + 0.3 * generator.normal(size=400)
    assert rank_correlation(x, y) > 0.8
    assert abs(partial_rank_correlation(x, y, [depth])) < 0.15
    assert partial_rank_correlation(x, x + y, [depth]) > 0.5


def test_coefficients_are_found_beside_type_and_depth() -> None:
    generator = np.random.default_rng(0)
    groups = ["q"] * 100 + ["v"] * 100
    depth, scores = generator.uniform(size=200), generator.normal(size=(2, 200))
    target = 5 * np.array([group == "v" for group in groups]) + 3 * depth**2 + scores[0]
    first, second = standardized_coefficients(scores, target, depth, groups)
    assert first == pytest.approx(1 / np.sqrt(1 + 9 * np.var(depth**2)), rel=0.1)
    assert second == pytest.approx(0, abs=1e-6)


def test_draws_stay_in_their_group_and_repeat() -> None:
    groups = ["b", "a"] * 30
    draws = bootstrap_draws(groups, draws=50)
    assert (np.asarray(groups)[draws] == np.asarray(groups)).all()
    assert (draws == bootstrap_draws(groups, draws=50)).all()
    assert len(np.unique(draws[0])) < 60


def test_many_draws_at_once_give_what_each_gives_alone() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], 20)
    x, y, depth = generator.normal(size=(3, 60))
    index = bootstrap_draws(groups, draws=5)
    at_once = [
        rank_correlation(x[index], y[index], groups),
        partial_rank_correlation(x[index], y[index], [depth[index]], groups),
        standardized_coefficients([x[index]], y[index], depth[index], groups)[0],
        thirds_ratio(x[index], np.exp(y[index]), groups),
    ]
    for one, drawn in enumerate(index):
        alone = [
            rank_correlation(x[drawn], y[drawn], groups),
            partial_rank_correlation(x[drawn], y[drawn], [depth[drawn]], groups),
            standardized_coefficients([x[drawn]], y[drawn], depth[drawn], groups)[0],
            thirds_ratio(x[drawn], np.exp(y[drawn]), groups),
        ]
        np.testing.assert_allclose([values[one] for values in at_once], alone)


def test_the_interval_leaves_out_draws_without_a_value() -> None:
    low, high = percentile_interval([*range(101), math.nan])
    assert (low, high) == (2.5, 97.5)
    assert all(math.isnan(end) for end in percentile_interval([math.nan]))


def test_the_third_of_lowest_score_is_compared_with_its_own_group() -> None:
    score, target = [1, 2, 3, 9, 8, 7], [1, 4, 16, 400, 1600, 100]
    assert thirds_ratio(score, target, list("aaabbb")) == pytest.approx(1 / 4)
    assert thirds_ratio([-value for value in score], target, list("aaabbb")) == pytest.approx(np.sqrt(4 * 1))
