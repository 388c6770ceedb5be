"""Shares of variance, orders and drifts of planted facts."""

import numpy as np
import pytest

from scripts.research.pretraining.facts import (
    candidates,
    column,
    drift,
    explained_by_layer,
    explained_with_interval,
    groups_of,
    order_kept,
)
from scripts.research.statistics import explained_by_groups
from tests.helpers.records.pretraining_points import planted


def test_the_role_explains_what_it_does() -> None:
    share, low, high = explained_with_interval(planted(), "condition_number", of_log=True)
    assert low <= share <= high
    assert share > 0.99
    share, _, _ = explained_with_interval(planted(), "relative_condition_number", of_log=False)
    assert share < 0.01
    shares = explained_by_groups([[0, 1, 4, 5], [0, 1, 0, 1]], list("aabb"))
    np.testing.assert_allclose(shares, [16 / 17, 0], atol=1e-12)


def test_the_layer_explains_what_it_does() -> None:
    experts = {
        f"model.layers.{layer}.mlp.experts.down_proj[{expert}]": {
            "module_type": "down_proj",
            "role": "expert",
            "condition_number": float(np.exp(layer + spread * (-1) ** expert)),
        }
        for layer, spread in ((0, 0.1), (2, 0.1))
        for expert in range(4)
    }
    assert explained_by_layer(experts) == pytest.approx((1 / 1.01, 1 / 7))


def test_an_order_is_kept_or_lost() -> None:
    assert order_kept(planted(), planted(3.0), "condition_number")[0] == pytest.approx(1)
    lost, low, high = order_kept(planted(), planted(seed=0), "condition_number")
    assert abs(lost) < 0.5
    assert low < lost < high
    # a role's own change is no change of the order within it
    assert order_kept(planted(), planted(between=0.5), "condition_number")[0] == pytest.approx(1)


def test_the_drift_is_that_of_log_kappa() -> None:
    assert drift(planted(), planted(np.e), list(planted())) == pytest.approx((1, 0))


def test_facts_of_different_shapes_compare_by_dimension() -> None:
    weights = planted()
    names = candidates(weights)
    assert len(names) == 40
    np.testing.assert_allclose(column(weights, names, "log_volume"), -column(weights, names, "condition_number"))


def test_types_have_short_labels_and_single_weights_are_left_out() -> None:
    weights = planted()
    weights["model.embed_tokens.weight"] = {"module_type": "model.embed_tokens", "role": "embedding"}
    assert {label: len(names) for label, names in groups_of({"weights": weights}).items()} == {
        "experts.down_proj": 20,
        "q_proj": 20,
    }
