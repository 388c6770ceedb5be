"""What the parts of the check share: where and how large they run, and how they wait for the device."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from scripts.bench.tuner.memory import peak_allocated

__all__ = ["Place", "Result", "peak_bytes", "synchronized", "timed"]

Result = dict[str, Any]
"""A part's figures; the list under `problems` is empty if all of them are as they should be."""


@dataclass(frozen=True)
class Place:
    """Where the parts run.

    Attributes:
        device: `cuda`, or `cpu` for the test of this very code.
        small: Tiny shapes: no figure means anything, but every line runs.
    """

    device: str
    small: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the models that train; tiny ones train in fp32, where results can be compared exactly."""
        return torch.float32 if self.small else torch.bfloat16


def synchronized(place: Place, work: Callable[[], Any]) -> Any:
    """Runs the work and waits until the device has done it: CUDA calls return before that."""
    result = work()
    if place.device == "cuda":
        torch.cuda.synchronize()
    return result


def timed(place: Place, work: Callable[[], Any], *, repeats: int = 3) -> tuple[float, Any]:
    """Median seconds over the repeats, after a call that loads kernels and fills caches; and the last result."""
    synchronized(place, work)
    seconds, result = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        result = synchronized(place, work)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2], result


def peak_bytes(place: Place, work: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator of the device holds during the work, all that is there before included.

    On the CPU only what the work itself allocates: its allocator keeps no count.
    """
    if place.device == "cpu":
        return peak_allocated(work)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    synchronized(place, work)
    return int(torch.cuda.max_memory_allocated())
