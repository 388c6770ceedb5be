"""Arguments and the results file that parts are written into."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench.results import arguments_of, earlier_results, made_by


def test_parts_of_a_file_are_kept_if_only_some_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"a": 1, "made_by": {"a": {}}}))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "b", "--out", str(out), "--repeats", "2"])
    arguments = arguments_of("doc", ["a", "b"], "elsewhere.json", repeats=7)
    assert (arguments.only, arguments.repeats) == (["b"], 2)
    assert earlier_results(arguments) == {"a": 1, "made_by": {"a": {}}}
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out)])
    assert earlier_results(arguments_of("doc", ["a", "b"], "elsewhere.json", repeats=7)) == {"made_by": {}}


def test_a_part_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "c"])
    with pytest.raises(SystemExit):
        arguments_of("doc", ["a", "b"], "out.json", repeats=1)


def test_a_part_records_what_made_it() -> None:
    record = made_by("python -m x", 3)
    assert (record["script"], record["repeats"]) == ("python -m x", 3)
    assert record["versions"]["torch"]
    assert record["machine"]
