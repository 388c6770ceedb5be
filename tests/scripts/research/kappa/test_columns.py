"""The atlas and the changes as columns, from the JSONL."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts.research.kappa.columns import load_atlases, load_changes, shape_of


def weight(name: str, kappa: float | None, *, role: str = "layer") -> dict[str, Any]:
    return {
        "model": "m",
        "inputs": "i",
        "name": name,
        "type": name.split(".")[-1],
        "role": role,
        "depth": 0,
        "shape": [4, 6],
        "condition_number": kappa,
    }


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_columns_are_sorted_and_null_is_infinity(tmp_path: Path) -> None:
    lines = [weight("0.up", 3.0), weight("0.down", None), weight("embed", 2.0, role="embedding")]
    (atlas,) = load_atlases(written(tmp_path / "atlas.jsonl", lines))
    assert [line["name"] for line in atlas.lines] == ["0.down", "0.up"]
    assert [line["name"] for line in atlas.others] == ["embed"]
    assert atlas.column("condition_number").tolist() == [math.inf, 3.0]
    assert (atlas.shape_names, atlas.type_names) == (["4 x 6"], ["down", "up"])
    assert shape_of({"shape": [6, 4]}) == "4 x 6"


def test_changes_are_compared_with_the_unchanged_weights(tmp_path: Path) -> None:
    (atlas,) = load_atlases(written(tmp_path / "atlas.jsonl", [weight("0.up", 3.0), weight("0.down", 5.0)]))
    common = {"inputs": "i"}
    changed = {"0.up": [4.0, 1.0, 1.0, 0.1], "0.down": [None, 1.0, 1.0, 0.2]}
    unchanged = {"0.up": [3.0, 1.0, 1.0, 0.0], "0.down": [5.0, 1.0, 1.0, 0.0]}
    lines = [
        {**common, "variant": "noise", "amount": 0.1, "weights": changed},
        {**common, "variant": "unchanged", "amount": 0.0, "weights": unchanged},
        {"inputs": "other", "variant": "bf16", "amount": 0.0, "weights": {}},
    ]
    (change,) = load_changes(written(tmp_path / "stability.jsonl", lines), atlas)
    assert change.label == "noise 0.1"
    assert change.scores["κ"].tolist() == [[5.0, 3.0], [math.inf, 4.0]]
    assert change.moved.tolist() == [0.2, 0.1]
    with pytest.raises(ValueError, match="lacks m unchanged"):
        load_changes(written(tmp_path / "stability.jsonl", lines[:1]), atlas)


def test_the_report_needs_an_atlas_of_one_version_a_model(tmp_path: Path) -> None:
    path = tmp_path / "atlas.jsonl"
    with pytest.raises(ValueError, match=r"no weights: python -m scripts\.research\.kappa measure"):
        load_atlases(path)
    path.write_text("".join(json.dumps({"model": "m", "inputs": inputs}) + "\n" for inputs in "ab"))
    with pytest.raises(ValueError, match="several versions of m"):
        load_atlases(path)
