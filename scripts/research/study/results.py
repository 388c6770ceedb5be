"""What a study's results file holds of the study as it is set up now, and which learning rates its sweeps chose."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from condft.training import read_metrics
from scripts.research.config import StudyConfig
from scripts.research.study.plan import RunSpec, best_of_sweep, run_key

__all__ = ["Results", "best_rates", "spec_of", "sweep_curves"]


class Results:
    """The runs of a results file that the present settings would give again.

    Attributes:
        runs: Key -> line of the finished (or failed) run.
        points: Key -> its evaluation points in the order of the steps.
    """

    def __init__(self, config: StudyConfig) -> None:
        """Reads the study's file; runs of other arms, and of other settings (by their keys), are left out."""
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
            # points of an interrupted attempt stay in the file; they belong to no run
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
    """The run that a line of the results file belongs to."""
    return RunSpec(line["arm"], line["rate"], line["seed"])


def sweep_curves(config: StudyConfig, results: Results, arm: str, seed: int) -> dict[float, list[tuple[float, float]]]:
    """Rate tried so far -> (test loss, `config.best_by`) along its run from a seed."""
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
