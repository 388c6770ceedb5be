"""Batched calls against threads on the CPU, for heads and experts: which of them `analyze` should use there.

A process for each number of threads, because torch's thread pools keep their size once they are made:

    python -m scripts.bench.analyzer.batches THREADS REPEATS
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from condft.analysis.threads import thread_map
from condft.report import Role
from condft.spectra import SpectralFacts, batch_size, batched_facts, spectral_facts
from condft.weights.unit import Unit

__all__ = ["batches_against_threads"]

# Enough for whole batches: none is filled up.
WORK = {"heads": (128, 64, 576), "experts": (20, 768, 2048)}


def batches_against_threads(repeats: int) -> list[dict[str, Any]]:
    """Rows of one and of two threads."""
    rows: list[dict[str, Any]] = []
    for threads in (1, 2):
        command = [sys.executable, "-m", "scripts.bench.analyzer.batches", str(threads), str(repeats)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        rows += json.loads(output.splitlines()[-1])
    return rows


def measured(threads: int, repeats: int, work: Mapping[str, tuple[int, int, int]] = WORK) -> list[dict[str, Any]]:
    """Milliseconds per matrix, in turns: the least of the repeats, which other work on the machine changes least."""
    torch.set_num_threads(threads)
    rows = []
    for name, shape in work.items():
        stack = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02
        contestants = {"threads": in_threads, "batches": in_batches, "one_by_one": one_by_one}
        answers = {way: contestant(stack) for way, contestant in contestants.items()}
        seconds: dict[str, list[float]] = {way: [] for way in contestants}
        for _ in range(repeats):
            for way, contestant in contestants.items():
                seconds[way].append(timed(partial(contestant, stack)))
        off = [
            abs(batched.condition_number / alone.condition_number - 1)
            for batched, alone in zip(answers["batches"], answers["one_by_one"], strict=True)
        ]
        least = {way: min(values) / len(stack) * 1e3 for way, values in seconds.items()}
        middle = {way: statistics.median(values) / len(stack) * 1e3 for way, values in seconds.items()}
        rows.append(
            {
                "work": name,
                "shape": shape,
                "batch": batch_size(shape[1:], stack.dtype),
                "torch_threads": threads,
                "least_ms_each": least,
                "median_ms_each": middle,
                "batches_over_threads": least["batches"] / least["threads"],
                "largest_difference": max(off),
            }
        )
    return rows


def in_threads(stack: torch.Tensor) -> list[SpectralFacts]:
    found: list[SpectralFacts] = []
    units = [Unit(str(index), matrix, matrix, "layer", Role.LAYER) for index, matrix in enumerate(stack)]
    thread_map(units, lambda unit: spectral_facts(unit.matrix), lambda unit, facts: found.append(facts))
    return found


def in_batches(stack: torch.Tensor) -> list[SpectralFacts]:
    size = batch_size(tuple(stack.shape[1:]), stack.dtype)
    found = [facts for batch in stack.split(size) for facts in batched_facts(list(batch))]
    return [facts for facts in found if facts is not None]


def one_by_one(stack: torch.Tensor) -> list[SpectralFacts]:
    return [spectral_facts(matrix) for matrix in stack]


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]))))
