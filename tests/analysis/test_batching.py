"""Units in batched calls: the same report; on the CPU here, where it has to be asked for."""

import math

import pytest
import torch
from torch import nn

from condft import NonFiniteWeightError, analyze
from condft.analysis import batching
from condft.analysis.batching import process_batches
from condft.spectra import batch_size
from condft.weights.unit import Unit


class Experts(nn.Module):
    """Two stacks of experts, and a weight that is measured alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(70, 96, 64, generator=generator) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(5, 64, 112, generator=generator) * 0.02)
        self.other = nn.Linear(40, 30, bias=False)
        self.other.weight = nn.Parameter(torch.randn(30, 40, generator=generator))


@pytest.fixture
def model() -> nn.ModuleDict:
    return nn.ModuleDict({"experts": Experts()})


@pytest.fixture
def batches_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches on the CPU; how many units each held."""
    sizes: list[int] = []

    def together(matrices, **rest):
        sizes.append(len(matrices))
        return batched(matrices, **rest)

    from condft.analysis import measure as measuring

    batched = measuring.batched_facts
    monkeypatch.setattr(batching, "_BATCHED_ON", ("cpu",))
    monkeypatch.setattr(measuring, "batched_facts", together)
    return sizes


@pytest.mark.parametrize("measures", ["basic", "all"])
def test_the_report_is_the_same(model, measures, monkeypatch, request):
    alone = analyze(model, measures=measures, progress=False)
    sizes = request.getfixturevalue("batches_here")
    together = analyze(model, measures=measures, progress=False)
    assert sizes == [64, 6, 5]
    assert [row.name for row in together.rows] == [row.name for row in alone.rows]
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        assert (ours.method, ours.digest, ours.resolved) == (theirs.method, theirs.digest, theirs.resolved)
        assert ours.condition_number == pytest.approx(theirs.condition_number, rel=1e-6)
        assert ours.frobenius_norm == pytest.approx(theirs.frobenius_norm, rel=1e-6)


def test_a_row_does_not_depend_on_what_else_is_requested(model, batches_here, tmp_path):
    """Some units only, the same from a cache that is completed, the lowest ones: bit for bit the whole report's."""
    whole = {row.name: row for row in analyze(model, progress=False).rows}
    names = [f"experts.gate_up_proj[{index}]" for index in (3, 41, 69)]
    for row in analyze(model, names=names[:2], cache=tmp_path, progress=False).rows:
        assert row == whole[row.name]
    assert {row.name: row for row in analyze(model, cache=tmp_path, progress=False).rows} == whole
    kept = analyze(model, keep_lowest=4, progress=False).rows
    assert len(kept) == 4
    for row in kept:
        assert row == whole[row.name]


def test_damaged_weights_are_named_and_the_rest_of_their_batch_is_kept(model, batches_here):
    good = {row.name: row for row in analyze(model, progress=False).rows}
    with torch.no_grad():
        model["experts"].gate_up_proj[17, 2, 3] = math.nan
    with pytest.raises(NonFiniteWeightError) as error:
        analyze(model, progress=False)
    assert error.value.names == ["experts.gate_up_proj[17]"]
    assert {row.name: row for row in error.value.report.rows} == {
        name: row for name, row in good.items() if name != "experts.gate_up_proj[17]"
    }


def test_a_spectrum_takes_an_svd_each(model, batches_here):
    rows = analyze(model, spectrum=True, progress=False).rows
    assert batches_here == []
    assert {row.method for row in rows} == {"svd"}


def test_batches_run_when_they_are_full_and_other_units_are_yielded(monkeypatch):
    monkeypatch.setattr(batching, "_BATCHED_ON", ("cpu",))
    monkeypatch.setattr(batching, "batch_size", lambda shape, dtype: 2 if shape[0] > 1 else 1)
    log: list[str] = []

    def units():
        for index, rows in enumerate((2, 3, 1, 2, 2, 1)):
            values = torch.zeros(rows, 4)
            log.append(f"taken {index}")
            yield Unit(str(index), values, values, "layer", "layer")

    def together(batch):
        log.append("batch " + " ".join(unit.name for unit in batch))
        return [unit.name * 2 for unit in batch]

    single = process_batches(units(), together, lambda unit, result: log.append(f"{unit.name}: {result}"))
    for unit in single:
        log.append(f"single {unit.name}")
    assert log == [
        *("taken 0", "taken 1", "taken 2", "single 2", "taken 3", "batch 0 3", "0: 00", "3: 33"),
        *("taken 4", "taken 5", "single 5", "batch 1", "1: 11", "batch 4", "4: 44"),
    ]


def test_on_the_cpu_threads_are_faster_so_nothing_is_batched():
    values = torch.zeros(64, 96)
    assert batch_size((64, 96), values.dtype) > 1
    units = [Unit(str(index), values, values, "layer", "layer") for index in range(3)]

    def never(batch):
        raise AssertionError(batch)

    assert list(process_batches(units, never, lambda unit, result: None)) == units
