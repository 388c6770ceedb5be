"""metrics.jsonl: flushed lines, a torn tail is no error, and a resume cuts back to its checkpoint."""

import json
from pathlib import Path

import pytest

from condft.training.metrics import MetricsFile, read_metrics, truncate_metrics


def test_lines_are_there_before_closing_and_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as metrics:
        metrics.append({"step": 1, "grad_norm": float("inf")})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "grad_norm": None}]
    with MetricsFile(path) as metrics:
        metrics.append({"step": 2})
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl", enabled=False) as metrics:
        metrics.append({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_truncation_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert truncate_metrics(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert truncate_metrics(tmp_path / "new.jsonl", 0) == []


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds 1 steps, the checkpoint 5"):
        truncate_metrics(path, 5)
