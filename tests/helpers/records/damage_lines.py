"""Results of a single-tensor experiment that was never run: damage rises with κ, whatever the type."""

from typing import Any


def experiment_lines(*, layers: int) -> list[dict[str, Any]]:
    """The experiment's line, the scores' lines, and the tensors' lines: two types in every layer."""
    common = {"experiment": "e", "commit": "0123456789abcdef", "machine": {"processor": "p", "cores": 2}}
    protocol = {"seed": 0, "relative_norm": 0.01, "equal_gain": 0.01}
    base = {"protocol": protocol, "base_german_ce": 3.0, "base_english_ce": 3.5}
    lines: list[dict[str, Any]] = [{"kind": "experiment", "name": "experiment", **common, **base}]
    tensors = []
    for layer in range(layers):
        for number, kind in enumerate(("q_proj", "v_proj")):
            rank = layer + 1 + 20 * number
            name = f"model.layers.{layer}.self_attn.{kind}.weight"
            facts = dict.fromkeys(("gradient_norm", "slope", "fisher_trace", "fisher_along"), 1.0 + 0.1 * (rank % 3))
            facts |= {"condition_number": 10.0 + rank, "relative_condition_number": 0.1 * rank, "stable_rank": 2.0}
            facts |= {"entropy_deficit": 1.0 / rank, "frobenius_norm": 1.0 + 0.01 * rank}
            place = {"type": kind, "layer": layer, "shape": [3, 4]}
            lines.append({"kind": "scores", "name": name, **common, **place, **facts})
            points = [
                {"gain": gain, "gain_error": 0.001, "damage_kl": rank * gain**2, "damage_ce": 0.1 * gain}
                for gain in (0.009, 0.011)
            ]
            tensors.append({"kind": "tensor", "name": name, "points": points, "cpu_seconds": 1.0, **common})
    return [*lines, *tensors]
