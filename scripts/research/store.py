"""The study's JSONL, and locks that let several processes share its runs."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from condft.training import read_metrics
from scripts.research.config import StudyConfig
from scripts.research.study.plan import RunSpec, best_of_sweep, run_key


def append_line(path: str | Path, record: dict[str, Any]) -> None:
    """Appends one record in a single write, which other processes' writes cannot come between.

    Raises:
        ValueError: NaN or infinity in the record: they are not JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
    if written != len(line):
        raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")


@contextmanager
def claimed(folder: str | Path, key: str) -> Iterator[bool]:
    """Within, this process has the run to itself; yields False if another one has it.

    The lock goes with the process, whatever ends it, so an interrupted run is free again at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def waiting_for(folder: str | Path, name: str) -> Iterator[None]:
    """Within, no other process is in the same section: what is shared is made once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Results:
    """What a results file holds of one study as it is set up now.

    Attributes:
        runs: Key -> line of the finished (or failed) run.
        points: Key -> its evaluation points in the order of the steps.
    """

    def __init__(self, config: StudyConfig) -> None:
        """Reads the study's file; runs of other arms and, as their keys tell, of other settings are left out."""
        lines, current = read_metrics(config.results), cache(lambda arm, seed: config.of(arm, seed).determining())
        self.runs = {
            line["key"]: line
            for line in lines
            if line["kind"] == "run"
            and line["arm"] in config.arms
            and line["key"] == run_key(spec_of(line), current(line["arm"], line["seed"]), line["inputs"])
        }
        self.points: dict[str, list[dict[str, Any]]] = {key: [] for key in self.runs}
        for line in lines:
            # points of an attempt that was interrupted stay in the file; they belong to no run
            if line["kind"] == "point" and line["attempt"] == self.runs.get(line["key"], {}).get("attempt"):
                self.points[line["key"]].append(line)

    def by_spec(self) -> dict[RunSpec, str]:
        """Spec -> key of every run; of several (other inputs), the last."""
        return {spec_of(run): key for key, run in self.runs.items()}

    def curve(self, key: str, measure: str) -> list[tuple[float, float]]:
        """(test loss, measure) along a run, where the measure was taken; empty for a run that failed."""
        if self.runs[key]["status"] != "finished":
            return []
        return [(point["test_loss"], point[measure]) for point in self.points[key] if measure in point]


def spec_of(line: Mapping[str, Any]) -> RunSpec:
    """The run that a line of the results file is of."""
    return RunSpec(line["arm"], line["rate"], line["seed"])


def sweep_curves(config: StudyConfig, results: Results, arm: str, seed: int) -> dict[float, list[tuple[float, float]]]:
    """Rate tried so far -> (test loss, the forgetting that tells which is best) along its run from a seed."""
    keys = results.by_spec()
    specs = {rate: RunSpec(arm, rate, seed) for rate in config.arms[arm].rates}
    return {rate: results.curve(keys[spec], config.best_by) for rate, spec in specs.items() if spec in keys}


def best_rates(config: StudyConfig, results: Results) -> dict[str, list[float]]:
    """Each arm's best rate at each level of the study, on its first seed and without repetition.

    Empty for an arm whose sweep is not finished, or failed throughout.
    """
    best: dict[str, list[float]] = {}
    for name, arm in config.arms.items():
        curves = sweep_curves(config, results, name, config.seeds[0])
        finished = len(curves) == len(set(arm.rates))
        chosen = [best_of_sweep(curves, level) for level in config.levels] if finished else []
        best[name] = list(dict.fromkeys(rate for rate in chosen if rate is not None))
    return best
