"""The check's parts in their own processes, and the file that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.gpu import run
from scripts.bench.gpu.part import Place

SMALL = ["--device", "cpu", "--small"]


def test_every_part_exists_and_has_a_budget_under_ten_minutes_in_all() -> None:
    assert all(callable(run.part_of(name)) and budget > 0 for name, (_, budget) in run.PARTS.items())
    assert run.TOTAL_SECONDS < 600


def test_a_part_runs_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    found = run.run_part("batches", Place("cpu", small=True), seconds=200)
    assert found["ok"], found
    assert found["result"]["heads"]["largest_error"] < 1e-3


def test_a_part_that_takes_too_long_is_stopped() -> None:
    found = run.run_part("batches", Place("cpu", small=True), seconds=0)
    assert not found["ok"]
    assert "budget" in found["error"]


def test_a_failed_part_stops_no_other_and_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    seen: list[str] = []

    def fake(name: str, place: Place, seconds: float) -> dict[str, Any]:
        seen.append(name)
        if name == "routes":
            return {"ok": False, "seconds": 1.0, "error": "illegal memory access"}
        problems = ["no memory was saved"] if name == "offload_base" else []
        return {"ok": not problems, "seconds": 1.0, "result": {"problems": problems}}

    monkeypatch.setattr(run, "run_part", fake)
    assert run.main([*SMALL, "--out", str(out)]) == 1
    content = json.loads(out.read_text())
    assert seen == list(content["parts"]) == list(run.PARTS)
    assert content["failed"] == ["offload_base", "routes"]
    assert content["versions"]["torch"]
    assert (content["device"] != "", content["small"]) == (True, True)
    monkeypatch.setattr(run, "run_part", lambda *_: {"ok": True, "seconds": 1.0, "result": {"problems": []}})
    assert run.main([*SMALL, "--out", str(out), "--only", "routes"]) == 1  # the other one is still listed
    assert json.loads(out.read_text())["failed"] == ["offload_base"]
    assert run.main([*SMALL, "--out", str(out), "--only", "offload_base"]) == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run.main(["--only", "routes"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
