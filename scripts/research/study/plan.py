"""Which runs a study has, in which order, and the key of each. Pure logic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.research.config import ArmSection, digest_of
from scripts.research.study.levels import value_at_level


@dataclass(frozen=True, order=True)
class RunSpec:
    """One run: an arm at a learning rate from a seed."""

    arm: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} lr {self.rate:g} seed {self.seed}"


def run_key(spec: RunSpec, determining: Mapping[str, Any], inputs: str) -> str:
    """16 hex digits over everything that determines a run's figures; a run of the same key is never done again.

    Args:
        spec: The run.
        determining: Of the study (`StudyConfig.determining`).
        inputs: Digest of the model's and the data's bytes.
    """
    run = {"arm": spec.arm, "rate": spec.rate, "seed": spec.seed}
    return digest_of({"run": run, "study": dict(determining), "inputs": inputs})


def sweep_order(rates: Sequence[float]) -> list[float]:
    """The middle rate first (the lower one of two), then outwards: an early stop has the most likely one."""
    rising = sorted(set(rates))
    middle = rising[(len(rising) - 1) // 2]
    return sorted(rising, key=lambda rate: (abs(rising.index(rate) - rising.index(middle)), rate))


def plan_runs(
    arms: Mapping[str, ArmSection],
    seeds: Sequence[int],
    best_rates: Mapping[str, Sequence[float]],
    sweep_seeds: Sequence[int],
) -> list[RunSpec]:
    """All runs that are known by now; those that answer most come first.

    The main arms at their middle rates on the first seed; then the rest of their sweeps; then the other seeds, one
    after the other, each arm at its best rates (at all, if the seed sweeps); then the same for all other arms.

    Args:
        arms: Name -> section, in the study's order.
        seeds: The first one sweeps.
        best_rates: Name -> rates that the arm's sweep on the first seed chose, one a level where they differ; none
            while it is not finished.
        sweep_seeds: The seeds that run every rate.
    """
    runs: list[RunSpec] = []
    for main in (True, False):
        group = {name: sweep_order(arm.rates) for name, arm in arms.items() if arm.main is main}
        runs += [RunSpec(name, rates[0], seeds[0]) for name, rates in group.items()]
        runs += [RunSpec(name, rate, seeds[0]) for name, rates in group.items() for rate in rates[1:]]
        for seed in seeds[1:]:
            chosen = group if seed in sweep_seeds else best_rates
            runs += [RunSpec(name, rate, seed) for name in group for rate in chosen[name]]
    return runs


def count_runs(
    arms: Mapping[str, ArmSection],
    seeds: Sequence[int],
    best_rates: Mapping[str, Sequence[float]],
    sweep_seeds: Sequence[int],
) -> int:
    """How many runs the whole study has; an arm whose sweep is not finished counts as choosing one rate."""
    sweeping, others = len(sweep_seeds), len(seeds) - len(sweep_seeds)
    return sum(sweeping * len(set(arm.rates)) + others * max(1, len(best_rates[name])) for name, arm in arms.items())


def best_of_sweep(curves: Mapping[float, Sequence[tuple[float, float]]], level: float) -> float | None:
    """The rate of a finished sweep that forgets least where the test loss has fallen to `level`.

    Where no rate gets there, the one that comes nearest.

    Args:
        curves: Rate -> (test loss, forgetting) along the run, from its start; empty for a run that failed.
        level: Test loss.

    Returns:
        The rate; None if every run failed.
    """
    reached = {rate: value_at_level(curve, level) for rate, curve in curves.items()}
    forgotten = {rate: value for rate, value in reached.items() if value is not None}
    if forgotten:
        return min(forgotten, key=lambda rate: (forgotten[rate], rate))
    nearest = {rate: min(loss for loss, _ in curve) for rate, curve in curves.items() if curve}
    return min(nearest, key=lambda rate: (nearest[rate], rate)) if nearest else None
