"""The work shared between processes: which does what, and two real ones."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from condft import CondFTConfig, SpectralReport, analyze
from condft.analysis import distributed
from condft.analysis.distributed import WorkPlan, share_units
from condft.analysis.measure import MeasureSpec, UnitInfo
from condft.report import Role, SkippedWeight, SkipReason
from condft.runtime.process_group import ProcessGroup
from condft.weights.walk import iter_units
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.processes import ROOT
from tests.workers.distributed import all_routes

LLAMA_LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def info(name: str, shape: tuple[int, int], *, collective: bool = False) -> UnitInfo:
    return UnitInfo(name, shape, shape, "float32", "type", Role.LAYER, None, collective)


def plan_of(infos: list[UnitInfo], size: int, holders: Mapping[str, list[int]] | None = None) -> WorkPlan:
    group = ProcessGroup()
    group.size = size
    everywhere = {info.name: list(range(size)) for info in infos}
    return WorkPlan(group, {info.name: info for info in infos}, holders or everywhere, {})


def loads(plan: WorkPlan, spec: MeasureSpec) -> list[float]:
    _, owner = plan.assign({info.name: info.cost(spec) for info in plan.infos.values()})
    assert owner.keys() == plan.infos.keys()
    return [sum(i.cost(spec) for i in plan.infos.values() if owner[i.name] == rank) for rank in range(plan.group.size)]


@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("measures", ["basic", "all"])
@pytest.mark.parametrize("layers", [1, 30])
def test_each_of_two_processes_gets_half_the_cost_of_a_llama(layers: int, measures: Any, collective: bool) -> None:
    shapes = LLAMA_LAYER * layers
    infos = [info(f"{index:03}.weight", shape, collective=collective) for index, shape in enumerate(shapes)]
    parts = loads(plan_of(infos, 2), MeasureSpec(measures))
    assert max(parts) <= 1.2 * sum(parts) / 2


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    collective=st.lists(st.booleans(), min_size=40, max_size=40),
    size=st.integers(1, 5),
)
def test_no_process_has_more_than_its_part_and_one_unit(sizes: list[int], collective: list[bool], size: int) -> None:
    infos = [
        info(f"{i}.weight", (n, n), collective=c) for i, (n, c) in enumerate(zip(sizes, collective, strict=False))
    ]
    plan = plan_of(infos, size)
    rounds, owner = plan.assign({info.name: info.num_parameters for info in infos})
    assert owner.keys() == plan.infos.keys()
    assert sorted(n for r in rounds for units in r for n in units) == sorted(i.name for i in infos if i.collective)
    for weights in rounds:  # in a round, no process does two weights while another has none
        assert len({owner[name] for units in weights for name in units}) == len(weights)
    if not any(i.collective for i in infos):
        costs = [n * n for n in sizes]
        parts = [sum(c for c, i in zip(costs, infos, strict=True) if owner[i.name] == rank) for rank in range(size)]
        assert max(parts) <= sum(costs) / size + max(costs)


def test_a_unit_goes_to_a_process_that_holds_it() -> None:
    infos = [info(f"{index}.weight", (100, 100)) for index in range(6)]
    holders = {i.name: [0] if index < 2 else [0, 1] for index, i in enumerate(infos)}
    _, owner = plan_of(infos, 2, holders).assign({i.name: 1.0 for i in infos})
    assert {owner["0.weight"], owner["1.weight"]} == {0}
    assert sorted(owner.values()) == [0, 0, 0, 1, 1, 1]


def test_own_shares_add_up_to_the_whole_cost() -> None:
    infos = [info(f"{index}.weight", (10 * index + 1, 7)) for index in range(9)]
    plan, costs = plan_of(infos, 3), {i.name: float(i.num_parameters) for i in infos}
    shares = []
    for rank in range(3):
        plan.group.rank = rank
        shares.append(plan.own_share(costs))
    assert sum(shares) == pytest.approx(1.0)
    assert plan.own_share({}) == 0.0


def test_a_weight_on_the_meta_device_counts_only_if_no_process_has_it() -> None:
    def skip(name: str, reason: SkipReason) -> SkippedWeight:
        return SkippedWeight(name, (2, 2), reason)

    meta, tied = SkipReason.META_DEVICE, SkipReason.TIED
    by_rank = [[skip("a", meta), skip("b", meta), skip("c", tied)], [skip("b", meta), skip("c", tied)]]
    assert distributed._skipped_everywhere(by_rank) == [skip("b", meta), skip("c", tied)]


def test_units_and_other_weights_of_a_walk_are_separated() -> None:
    plan = share_units(iter_units(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))), ProcessGroup())
    assert list(plan.infos) == list(plan.units) == ["0.weight"]
    assert plan.holders == {"0.weight": [0]}
    assert [skip.name for skip in plan.skipped] == ["0.bias", "1.weight", "1.bias"]


def run_two(case: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.workers.distributed", case]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, cwd=ROOT) for rank in range(2)
    ]
    try:
        outcomes = [process.communicate(timeout=120)[1].decode() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outcomes
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(2)]


def one_process(model: nn.Module | None = None, **options: Any) -> Any:
    """The report of one process with as many threads as each of the two has, as it comes out of JSON."""
    model = build_tiny_llama() if model is None else model
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return json.loads(json.dumps(analyze(model, progress=False, **options).to_dict()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.multiprocess
def test_two_processes_give_the_report_of_one_process(tmp_path: Path) -> None:
    first, second = run_two("replicated", tmp_path)
    assert second.pop("alone") == first["plain"]
    assert first == second
    assert first["plain"] == one_process()
    assert {row["method"] for row in first["routes"]["rows"]} == {"cholesky", "eigen", "gram", "qr", "lu", "svd"}
    assert first["routes"] == one_process(all_routes())
    assert first["all"] == one_process(measures="all")
    assert first["kept"] == one_process(keep_lowest=5)
    assert first["stratified"] == one_process(keep_lowest=2, stratify="module_type")
    assert [row["name"] for row in first["names"]["rows"]] == ["model.embed_tokens.weight"]


@pytest.mark.multiprocess
def test_a_process_that_holds_only_meta_tensors_gets_the_report(tmp_path: Path) -> None:
    first, second = run_two("meta", tmp_path)
    assert first == second
    assert first["plain"] == one_process()


@pytest.mark.multiprocess
def test_sharded_weights_are_gathered_and_the_first_process_alone_writes(tmp_path: Path) -> None:
    first, second = run_two("sharded", tmp_path)
    assert first == second
    expected = one_process()
    for name, report in (("plain", expected), ("again", expected), ("kept", one_process(keep_lowest=5))):
        assert first[name]["rows"] == report["rows"], name
        assert first[name]["screened"] == report["screened"], name
    assert first["head"]["rows"] == one_process(granularity="head")["rows"]
    (entry,) = (tmp_path / "cache-0").glob("*.json")
    assert [row.name for row in SpectralReport.load(entry).rows] == [row["name"] for row in expected["rows"]]
    assert not (tmp_path / "cache-1").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["replicated", "meta"])
def test_get_peft_model_walks_once_on_each_process_and_chooses_as_one_does(tmp_path: Path, kind: str) -> None:
    first, second = run_two(f"adapter_{kind}", tmp_path)
    assert first == second
    assert first["walks"] == 1
    config = CondFTConfig(num_tensors=5)
    get_peft_model(build_tiny_llama(), config)
    names = ("target_units", "base_digests", "report_fingerprint", "selected_by")
    assert {name: first[name] for name in names} == {name: getattr(config, name) for name in names}


@pytest.mark.multiprocess
def test_an_error_on_one_process_is_the_same_error_on_both(tmp_path: Path) -> None:
    build_tiny_llama().save_pretrained(tmp_path / "checkpoint")
    build_tiny_llama().save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    first, second = run_two("errors", tmp_path)
    assert first == second
    assert first["file"].startswith("FileNotFoundError: ")
    assert "nowhere" in first["file"]
    assert first["shard"].startswith("ValueError: ")
    assert "broken/model.safetensors is damaged" in first["shard"]
    assert "the processes hold different models: weight is" in first["shapes"]
    for kind in ("replicated", "sharded"):
        message, names, report = first[kind]
        assert message.startswith("NaN or infinity in 2 of 29 weights")
        assert names == ["model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
        assert len(SpectralReport.from_dict(report).rows) == 27


@pytest.mark.multiprocess
def test_an_error_amid_the_gathers_ends_both_processes(tmp_path: Path) -> None:
    first, second = run_two("late", tmp_path)
    assert first == second == {"late": "ValueError: the third matrix is one too many"}
