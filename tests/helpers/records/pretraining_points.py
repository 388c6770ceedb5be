"""Facts of the weights of a pre-training that was never run."""

from typing import Any

import numpy as np

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


def planted_points() -> list[dict[str, Any]]:
    """Three points: κ doubles, doubles again, and loses its order at the end."""
    common = {"seed": 0, "commit": "0123456789abcdef", "seconds_training": 60.0}
    return [
        {
            **common,
            "step": step,
            "tokens": 100 * step,
            "train_loss": loss if step else None,
            "held_out_loss": loss,
            "weights": weights,
        }
        for step, loss, weights in ((0, 8.0, planted()), (3, 6.0, planted(2.0)), (9, 5.0, planted(4.0, seed=0)))
    ]
