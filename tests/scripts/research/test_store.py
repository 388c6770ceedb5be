"""Lines that are appended whole, and locks between processes."""

from pathlib import Path

import pytest

from condft.training import read_metrics
from scripts.research.store import append_line, claimed, lines_by_name, waiting_for


def test_a_line_is_appended_whole_and_is_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"b": "ä"})
    assert read_metrics(path) == [{"a": 1}, {"b": "ä"}]
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"loss": float("nan")})
    assert len(read_metrics(path)) == 2


def test_the_first_line_of_a_name_counts() -> None:
    lines = [
        {"kind": "tensor", "experiment": "e", "name": "a", "value": 1},
        {"kind": "tensor", "experiment": "e", "name": "a", "value": 2},
        {"kind": "tensor", "experiment": "other", "name": "b", "value": 3},
        {"kind": "scores", "experiment": "e", "name": "c", "value": 4},
    ]
    assert {name: line["value"] for name, line in lines_by_name(lines, "tensor", "e").items()} == {"a": 1}


def test_what_is_waited_for_is_free_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with waiting_for(tmp_path / "locks", "shared"), claimed(tmp_path / "locks", "other") as free:
            assert free


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    with claimed(tmp_path, "k") as mine, claimed(tmp_path, "k") as again, claimed(tmp_path, "other") as other:
        assert (mine, again, other) == (True, False, True)
    with claimed(tmp_path, "k") as mine:
        assert mine
