"""Contestants timed in turns: what slows the machine down for a while slows all of them, and changes no ratio."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["MIN_ROUNDS", "Runs", "medians", "race", "ratio"]

MIN_ROUNDS = 3
CLOCKS: dict[str, Callable[[], float]] = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}

Runs = dict[str, dict[str, list[float]]]
"""Contestant -> clock ("seconds", "cpu_seconds": of all threads) -> what each round took."""


def race(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = float("inf"),
    before: Mapping[str, Callable[[], Any]] | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> Runs:
    """Each contestant once a round, a different one first each time, after a warm-up round.

    Args:
        contestants: Name -> what to time.
        rounds: How many, unless time runs out.
        seconds: After these no further round begins; `MIN_ROUNDS` are run in any case.
        before: Name -> what to do each time before the clock starts.
        tick: Called after every round.
    """
    names = list(contestants)
    prepare = {name: (before or {}).get(name, lambda: None) for name in names}
    runs: Runs = {name: {clock: [] for clock in CLOCKS} for name in names}
    for name in names:
        prepare[name]()
        contestants[name]()
    ends = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() >= ends:
            break
        gc.collect()
        first = index % len(names)
        for name in names[first:] + names[:first]:
            prepare[name]()
            began = {clock: read() for clock, read in CLOCKS.items()}
            contestants[name]()
            for clock, read in CLOCKS.items():
                runs[name][clock].append(read() - began[clock])
        tick()
    return runs


def medians(runs: Runs) -> dict[str, dict[str, float]]:
    """Contestant -> clock -> median over the rounds."""
    return {name: {clock: statistics.median(taken) for clock, taken in of.items()} for name, of in runs.items()}


def ratio(runs: Runs, ours: str, theirs: str) -> dict[str, float]:
    """Median over the rounds of ours / theirs, its quartiles, and the same of CPU time."""
    pairs = {
        clock: [mine / other for mine, other in zip(runs[ours][clock], runs[theirs][clock], strict=True)]
        for clock in CLOCKS
    }
    low, middle, high = statistics.quantiles(pairs["seconds"], n=4, method="inclusive")
    return {
        "ratio": middle,
        "low": low,
        "high": high,
        "cpu_ratio": statistics.median(pairs["cpu_seconds"]),
        "rounds": len(pairs["seconds"]),
    }
