"""What the report says of planted facts: a role that decides everything, an order that stays or is shuffled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.research.pretraining.facts import drift, explained_by_layer, explained_with_interval, order_kept
from scripts.research.pretraining.report import write_report
from scripts.research.statistics import explained_by_groups

TYPES = {"model.layers.*.self_attn.q_proj": 400.0, "model.layers.*.mlp.experts.down_proj": 9.0}


def planted(factor: float = 1.0, *, seed: int | None = None, between: float = 1.0) -> dict[str, dict[str, Any]]:
    """Twenty weights of either type whose κ rises with their number, times a factor; shuffled within it by a seed."""
    weights = {}
    for kind, middle in TYPES.items():
        order = np.arange(20) if seed is None else np.random.default_rng(seed).permutation(20)
        for index, rank in enumerate(order):
            value = float(middle**between * factor * np.exp(0.01 * rank))
            weights[f"{kind.replace('*', str(index))}.weight"] = {
                "module_type": kind,
                "role": "layer" if "attn" in kind else "expert",
                "shape": [32, 32] if "attn" in kind else [32, 48],
                "condition_number": value,
                "relative_condition_number": float(np.log(factor) + 0.01 * rank),
                "log_volume": -32.0 * value,
                "entropy_deficit": value,
                "stable_rank": 1 / value,
                "frobenius_norm": 1.0,
            }
    return weights


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


def test_tables_and_figures_come_from_the_points(tmp_path: Path) -> None:
    common = {"seed": 0, "commit": "0123456789abcdef", "seconds_training": 60.0}
    points = [
        {**common, "step": step, "tokens": 100 * step, "train_loss": loss if step else None, "held_out_loss": loss,
         "weights": weights}
        for step, loss, weights in ((0, 8.0, planted()), (3, 6.0, planted(2.0)), (9, 5.0, planted(4.0, seed=0)))
    ]  # fmt: skip
    tables, *figures = write_report(points, tmp_path / "run.jsonl")
    text = tables.read_text()
    assert "Seed 0, commit 0123456789ab; 900 tokens in 9 steps" in text
    assert "(experts.down_proj 20, q_proj 20)" in text
    assert "| 3 | 1.00 [1.00, 1.00] |" in text
    assert "explain 0.03" in text
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="train first"):
        write_report(points[:1], tmp_path / "run.jsonl")
