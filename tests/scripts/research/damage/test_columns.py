"""The experiment's JSONL as columns."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts.research.damage.columns import GRADIENT_SCORES, WEIGHT_SCORES, load_columns
from tests.helpers.records.damage_lines import experiment_lines


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_row_for_each_measured_tensor(tmp_path: Path) -> None:
    columns = load_columns(written(tmp_path / "r.jsonl", experiment_lines(layers=3)))
    assert columns.names == sorted(columns.names)
    assert (len(columns.names), columns.type_names) == (6, ["q_proj", "v_proj"])
    assert columns.depth.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert set(columns.scores) == {*WEIGHT_SCORES, *GRADIENT_SCORES}
    assert columns.of_type("v_proj").tolist() == [1, 3, 5]
    assert columns.near.tolist() == list(range(6))


def test_a_tensor_that_gained_nothing_has_no_damage_at_equal_gain(tmp_path: Path) -> None:
    lines = experiment_lines(layers=2)
    for point in lines[-1]["points"]:
        point["gain"] = -0.01
    columns = load_columns(written(tmp_path / "r.jsonl", lines))
    last = columns.names.index(lines[-1]["name"])
    assert [math.isnan(value) for value in columns.targets["kl_at_gain"]] == [i == last for i in range(4)]


def test_a_file_of_none_or_of_several_experiments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describes 0 experiments"):
        load_columns(tmp_path / "none.jsonl")
    lines = experiment_lines(layers=1)
    with pytest.raises(ValueError, match="describes 2 experiments"):
        load_columns(written(tmp_path / "r.jsonl", [lines[0], *lines]))
