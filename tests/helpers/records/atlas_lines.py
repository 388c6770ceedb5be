"""An atlas of a model that was never measured: one type of squares and one of rectangles."""

from typing import Any

import numpy as np


def atlas_lines(*, layers: int = 8, model: str = "tiny") -> list[dict[str, Any]]:
    """κ rises with depth in both types; an embedding comes last."""
    lines = []
    for layer in range(layers):
        for kind, shape in (("q_proj", [32, 32]), ("up_proj", [64, 32])):
            kappa = (100.0 if kind == "q_proj" else 8.0) * float(np.exp(0.1 * layer))
            lines.append(_line(model, f"model.layers.{layer}.{kind}", f"model.layers.*.{kind}", shape, kappa, layer))
    return [*lines, {**_line(model, "embed", "embed", [96, 32], 5.0, 0), "role": "embedding"}]


def _line(model: str, name: str, kind: str, shape: list[int], kappa: float, layer: int) -> dict[str, Any]:
    return {
        "model": model,
        "inputs": "i",
        "commit": "0123456789abcdef",
        "name": f"{name}.weight",
        "type": kind,
        "role": "layer",
        "depth": layer,
        "shape": shape,
        "condition_number": kappa,
        "relative_condition_number": 0.1 * layer,
        "random_condition_number": 90.0,
        "entropy_deficit": 0.5 + 0.01 * layer,
        "random_entropy_deficit": 0.4,
        "deficit_at_least": 0.1,
        "deficit_at_most": 2.0,
        "stable_rank": 4.0 + layer,
        "log_volume": -1.0,
    }


def change_lines() -> list[dict[str, Any]]:
    """The weights unchanged, in bf16 (nothing moves in order), and with noise that reverses the order of κ."""
    names = [line for line in atlas_lines() if line["role"] == "layer"]
    common = {"model": "tiny", "inputs": "i", "commit": "0123456789abcdef", "unresolved": 0}

    def weights(sign: float, moved: float) -> dict[str, list[float]]:
        return {line["name"]: [line["condition_number"] ** sign, 1.0, line["stable_rank"], moved] for line in names}

    return [
        {**common, "variant": "unchanged", "amount": 0.0, "weights": weights(1, 0.0)},
        {**common, "variant": "bf16", "amount": 0.0, "weights": weights(1, 0.002)},
        {**common, "variant": "noise", "amount": 0.1, "weights": weights(-1, 0.1)},
    ]
