"""Rows stored by content: what a second start measures, and which entries it never uses."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from condft import NonFiniteWeightError, SpectralReport, analyze
from condft.analysis import analyze as analyze_module
from condft.analysis import missing as missing_module
from condft.analysis.cache import open_cache
from condft.analysis.measure import ALGORITHM_VERSION
from tests.helpers.models.tiny_checkpoints import build


class Meter:
    """Counts what is really measured."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.bounded: list[str] = []


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    measure, lower_bound = missing_module.measure, missing_module.lower_bound

    def counted_measure(unit: Any, *args: Any) -> Any:
        meter.measured.append(unit.name)
        return measure(unit, *args)

    def counted_bound(unit: Any, *args: Any) -> Any:
        meter.bounded.append(unit.name)
        return lower_bound(unit, *args)

    monkeypatch.setattr(missing_module, "measure", counted_measure)
    monkeypatch.setattr(missing_module, "lower_bound", counted_bound)
    return meter


@contextmanager
def measuring(meter: Meter, count: int) -> Iterator[None]:
    meter.measured.clear()
    meter.bounded.clear()
    yield
    assert len(meter.measured) == count, meter.measured


def settled(folder: Path) -> Path:
    """The folder, with files that are old enough for an index (see `_TICK_NS`)."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60, time.time() - 60))
    return folder


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def test_the_second_start_measures_nothing_and_says_the_same(tiny_llama, tmp_path: Path, meter: Meter) -> None:
    with measuring(meter, 29):
        cold = analyze(tiny_llama(), cache=tmp_path, progress=False)
    with measuring(meter, 0):
        assert analyze(tiny_llama(), cache=tmp_path, progress=False) == cold
    (entry,) = entries(tmp_path)
    assert entry.name.startswith("LlamaForCausalLM-")
    assert SpectralReport.load(entry).rows == cold.rows
    with measuring(meter, 29):
        assert analyze(tiny_llama(), cache=False, progress=False) == cold


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_cache(True) is None  # as tests/conftest.py sets it
    assert open_cache(False) is None
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "here"))
    assert open_cache(True).folder == tmp_path / "here"
    assert open_cache(tmp_path / "there").folder == tmp_path / "there"
    assert open_cache(False) is None
    monkeypatch.delenv("CONDFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache(True).folder == tmp_path / "xdg" / "condft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_cache(True).folder == Path.home() / ".cache" / "condft"


def test_a_changed_weight_is_measured_again_and_no_other(tiny_llama, tmp_path: Path, meter: Meter) -> None:
    analyze(tiny_llama(), cache=tmp_path, progress=False)
    tuned = tiny_llama()
    tuned.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1.0
    with measuring(meter, 1):
        warm = analyze(tuned, cache=tmp_path, progress=False)
    assert meter.measured == ["model.layers.2.mlp.up_proj.weight"]
    assert warm == analyze(tuned, cache=False, progress=False)
    assert len(entries(tmp_path)) == 2


def test_swapped_weights_are_not_taken_for_each_other(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    analyze(model, cache=tmp_path, progress=False)
    one, other = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    one.weight, other.weight = other.weight, one.weight
    assert analyze(model, cache=tmp_path, progress=False) == analyze(model, cache=False, progress=False)


def test_some_names_are_served_from_the_whole_and_help_it(tiny_llama, tmp_path: Path, meter: Meter) -> None:
    names = {f"model.layers.{index}.mlp.up_proj.weight" for index in range(3)}
    with measuring(meter, 3):
        some = analyze(tiny_llama(), names=names, cache=tmp_path, progress=False)
    with measuring(meter, 26):
        analyze(tiny_llama(), cache=tmp_path, progress=False)
    with measuring(meter, 0):
        assert analyze(tiny_llama(), names=names, cache=tmp_path, progress=False) == some
        assert len(analyze(tiny_llama(), names=list(names)[:1], cache=tmp_path, progress=False).rows) == 1


def test_more_measures_complete_the_rows_and_less_are_served_from_them(
    tiny_llama, tmp_path: Path, meter: Meter
) -> None:
    basic = analyze(tiny_llama(), cache=tmp_path, progress=False)
    with measuring(meter, 29):
        spectra = analyze(tiny_llama(), spectrum=True, cache=tmp_path, progress=False)
    assert all(row.spectrum and row.log_volume is None for row in spectra.rows)
    with measuring(meter, 0):  # the SVD gave them for nothing
        whole = analyze(tiny_llama(), measures="all", cache=tmp_path, progress=False)
        assert analyze(tiny_llama(), cache=tmp_path, progress=False) == basic
        assert analyze(tiny_llama(), spectrum=True, cache=tmp_path, progress=False) == spectra
    assert all(row.log_volume is not None and row.spectrum is None for row in whole.rows)
    assert whole.measures == "all"
    assert len(entries(tmp_path)) == 1


def test_a_completed_entry_loses_nothing(tiny_llama, tmp_path: Path, meter: Meter) -> None:
    """A spectrum is kept when the rest of the model is measured without."""
    names = ["model.layers.0.mlp.up_proj.weight"]
    analyze(tiny_llama(), names=names, spectrum=True, cache=tmp_path, progress=False)
    with measuring(meter, 28):
        analyze(tiny_llama(), cache=tmp_path, progress=False)
    (whole,) = [report for report in map(SpectralReport.load, entries(tmp_path)) if len(report.rows) == 29]
    assert whole[names[0]].spectrum is not None


def test_a_folder_and_its_live_model_share_an_entry(tmp_path: Path, meter: Meter) -> None:
    model, folder, cache = build("MixtralForCausalLM", torch.bfloat16), tmp_path / "model", tmp_path / "cache"
    model.save_pretrained(folder)
    live = analyze(model, cache=cache, progress=False)
    with measuring(meter, 0):
        stored = analyze(folder, cache=cache, progress=False)
    assert (stored.rows, stored.skipped) == (live.rows, live.skipped)
    assert stored.model == str(folder)
    analyze(folder, granularity="head", cache=cache, progress=False)
    with measuring(meter, 0):
        analyze(model, granularity="head", cache=cache, progress=False)


def test_untouched_files_are_not_read_again_and_touched_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meter: Meter
) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    model = build("LlamaForCausalLM")
    model.save_pretrained(folder)
    cold = analyze(settled(folder), cache=cache, progress=False)
    with monkeypatch.context() as patch:

        def walk(*args: Any, **options: Any) -> Any:
            raise AssertionError("the model was built and its files were opened")

        patch.setattr(analyze_module, "iter_checkpoint_units", walk)
        assert analyze(folder, cache=cache, progress=False) == cold
        some = analyze(folder, names=[cold.rows[0].name], cache=cache, progress=False)
        assert some.rows == cold.rows[:1]
        kept = analyze(folder, keep_lowest=2, cache=cache, progress=False)
        with pytest.raises(AssertionError):
            analyze(folder, measures="all", cache=cache, progress=False)
    assert kept == analyze(folder, keep_lowest=2, cache=False, progress=False)
    model.model.embed_tokens.weight.data[0, 0] += 1.0
    model.save_pretrained(folder)
    changed = analyze(folder, cache=cache, progress=False)
    assert changed.fingerprint != cold.fingerprint
    assert changed == analyze(folder, cache=False, progress=False)


def test_a_folder_with_files_written_just_now_gets_no_index(tmp_path: Path) -> None:
    """A second write within the same tick of the clock would not change size and time."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    build("LlamaForCausalLM").save_pretrained(folder)
    analyze(folder, cache=cache, progress=False)
    assert not (cache / "checkpoints").exists()
    analyze(settled(folder), cache=cache, progress=False)
    assert len(list((cache / "checkpoints").iterdir())) == 1


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:-50])


def _stale(path: Path) -> None:
    path.write_text(path.read_text().replace('"algorithm": "', '"algorithm": "0.'))


def _foreign(path: Path) -> None:
    analyze(nn.Linear(3, 3), cache=path.parent / "other", progress=False)
    path.write_text(entries(path.parent / "other")[0].read_text())


def _nonsense(path: Path) -> None:
    path.write_text('["not", "a report"]')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "not JSON"),
        (_stale, f"version 0.{ALGORITHM_VERSION} of the algorithm"),
        (_foreign, "other weights"),
        (_nonsense, "not a spectral report"),
    ],
)
def test_a_bad_entry_is_ignored_with_a_warning_and_rewritten(
    tiny_llama, tmp_path: Path, meter: Meter, damage, reason
) -> None:
    cold = analyze(tiny_llama(), cache=tmp_path, progress=False)
    (entry,) = entries(tmp_path)
    damage(entry)
    with pytest.warns(UserWarning, match=reason) as warned, measuring(meter, 29):
        assert analyze(tiny_llama(), cache=tmp_path, progress=False) == cold
    assert len(warned) == 1
    assert str(entry) in str(warned[0].message)
    with warnings.catch_warnings(), measuring(meter, 0):
        warnings.simplefilter("error")
        assert analyze(tiny_llama(), cache=tmp_path, progress=False) == cold


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {}}'])
def test_a_bad_index_of_a_folder_is_ignored_and_rewritten(tmp_path: Path, text: str) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    build("LlamaForCausalLM").save_pretrained(folder)
    cold = analyze(settled(folder), cache=cache, progress=False)
    (index,) = (cache / "checkpoints").iterdir()
    good = index.read_text()
    index.write_text(text)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert analyze(folder, cache=cache, progress=False) == cold
    assert json.loads(index.read_text()) == json.loads(good)


def test_an_unwritable_folder_gives_one_warning_and_does_not_matter(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("a file is where the folder should be")
    monkeypatch.setattr(missing_module, "_WRITE_EVERY", 0.0)
    with pytest.warns(UserWarning, match="CONDFT_CACHE") as warned:
        report = analyze(tiny_llama(), cache=tmp_path / "file" / "cache", progress=False)
    assert len(warned) == 1
    assert len(report.rows) == 29


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_analysis_goes_on_where_it_was(
    tiny_llama, tmp_path: Path, meter: Meter, monkeypatch, end
) -> None:
    monkeypatch.setattr("condft.analysis.threads._SMALL_ORDER", 0)  # one after another, so that ten are done
    measure = missing_module.measure

    def interrupted(unit: Any, *args: Any) -> Any:
        if len(meter.measured) == 10:
            raise end
        return measure(unit, *args)

    with monkeypatch.context() as patch:
        patch.setattr(missing_module, "measure", interrupted)
        with pytest.raises(end):
            analyze(tiny_llama(), cache=tmp_path, progress=False)
    assert len(SpectralReport.load(entries(tmp_path)[0]).rows) == 10
    with measuring(meter, 19):
        warm = analyze(tiny_llama(), cache=tmp_path, progress=False)
    assert warm == analyze(tiny_llama(), cache=False, progress=False)


def test_a_killed_analysis_has_stored_what_it_had(tmp_path: Path) -> None:
    """Nothing runs after SIGKILL, so only what was written from time to time is there."""
    script = (
        "import os, signal, sys, torch; from torch import nn; import condft.analysis.analyze as analysis\n"
        "import condft.analysis.missing as missing\n"
        "missing._WRITE_EVERY, measure, done = 0.0, missing.measure, []\n"
        "def killed(*args):\n"
        "    done.append(0)\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if len(done) == 3 else measure(*args)\n"
        "missing.measure = killed; torch.manual_seed(0); torch.set_num_threads(1)\n"
        "analysis.analyze(nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]), cache=sys.argv[1], progress=False)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    (entry,) = entries(tmp_path)
    assert len(SpectralReport.load(entry).rows) == 2


def test_non_finite_weights_are_an_error_again_and_the_rest_is_kept(tiny_llama, tmp_path: Path, meter: Meter) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    for count in (29, 1):
        with measuring(meter, count), pytest.raises(NonFiniteWeightError) as error:
            analyze(model, cache=tmp_path, progress=False)
        assert error.value.names == ["model.layers.1.mlp.up_proj.weight"]
        assert len(error.value.report.rows) == 28


def test_several_at_once_leave_a_good_entry(tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing_module, "_WRITE_EVERY", 0.0)
    model = tiny_llama(layers=1)
    expected = analyze(model, cache=False, progress=False)
    reports: list[SpectralReport] = []
    threads = [
        threading.Thread(target=lambda: reports.append(analyze(model, cache=tmp_path, progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.rows for report in reports] == [expected.rows] * 4
    assert {SpectralReport.load(entry).rows for entry in entries(tmp_path)} == {expected.rows}


@pytest.mark.parametrize("stratify", [None, "module_type"])
@pytest.mark.parametrize("before", [None, "whole", "all", 1, 7])
def test_keep_lowest_gives_the_same_report_with_any_cache(
    tiny_llama, tmp_path: Path, meter: Meter, stratify, before
) -> None:
    expected = analyze(tiny_llama(), keep_lowest=3, stratify=stratify, progress=False)
    if before == "whole":
        analyze(tiny_llama(), cache=tmp_path, progress=False)
    elif before == "all":
        analyze(tiny_llama(), measures="all", cache=tmp_path, progress=False)
    elif before is not None:
        analyze(tiny_llama(), keep_lowest=before, stratify=stratify, cache=tmp_path, progress=False)
    assert analyze(tiny_llama(), keep_lowest=3, stratify=stratify, cache=tmp_path, progress=False) == expected
    with measuring(meter, 0):
        assert analyze(tiny_llama(), keep_lowest=3, stratify=stratify, cache=tmp_path, progress=False) == expected
        assert not meter.bounded


def test_the_same_values_in_other_roles_and_storages(tmp_path: Path) -> None:
    """What depends on the place of the values is not taken from the cache."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    first = analyze(nn.ModuleDict({"a": linear}), cache=tmp_path, progress=False)
    embedding = nn.Embedding(4, 6, _weight=linear.weight.detach().clone())
    second = analyze(nn.ModuleDict({"a": embedding}), cache=tmp_path, progress=False)
    assert first.rows[0].role != second.rows[0].role
    assert second == analyze(nn.ModuleDict({"a": embedding}), cache=False, progress=False)


def test_rank_deficient_weights_survive_the_cache(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(5, 5) for name in "abc"})
    for layer in model.values():
        nn.init.zeros_(layer.weight)
    cold = analyze(model, keep_lowest=1, cache=tmp_path, progress=False)
    assert [unit.condition_number_bound for unit in cold.screened] == [float("inf")] * 2
    assert analyze(model, keep_lowest=1, cache=tmp_path, progress=False) == cold
    assert SpectralReport.from_dict(json.loads(json.dumps(cold.to_dict()))) == cold


def test_weights_changed_in_place_under_their_old_time_are_read_again(tiny_llama, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    settled(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before, status = analyze(tmp_path / "model", cache=tmp_path / "cache", progress=False), file.stat()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "other")
    content = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert len(content) == status.st_size
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_ino == status.st_ino
    after = analyze(tmp_path / "model", cache=tmp_path / "cache", progress=False)
    assert after.rows[0].sigma_max == pytest.approx(2 * before.rows[0].sigma_max)
