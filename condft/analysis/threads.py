"""Work on many small matrices at once, one per core, since one of them cannot keep several cores busy.

A matrix product of order 600 takes as long on two threads as on one and a half. With one matrix per core, no core
waits for another. Large matrices are processed one after another, on all threads.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from condft.weights.unit import Unit

__all__ = ["thread_map"]

T = TypeVar("T")

_SMALL_ORDER = 1024
_SMALL_ENTRIES = 2**22  # up to one unit more than there are workers is in memory at a time
_MOST_WORKERS = 8  # more workers wait for Python's lock; instead, each worker gets several of torch's threads
_STARTING = threading.Lock()


def thread_map(units: Iterable[Unit], work: Callable[[Unit], T], on_result: Callable[[Unit, T], None]) -> None:
    """Does the work of every unit. Small units on the CPU are processed several at a time, in threads.

    Args:
        units: With their values in memory. The next one is taken when a worker is free for it.
        work: Called from this thread or another one, so it must not change shared state.
        on_result: Called with each unit and its result: in the order of the units, in the caller's thread, as soon
            as the result is there.

    Raises:
        Exception: What `work` raises, when it is that unit's turn. Later units may have been started.
    """
    with _STARTING:
        # Under the lock: while another call starts its workers, the number is that of a worker.
        threads = torch.get_num_threads()
    if threads == 1:
        for unit in units:
            on_result(unit, work(unit))
        return
    started: deque[tuple[Unit, Future[T]]] = deque()

    def finish_oldest() -> None:
        unit, result = started.popleft()
        on_result(unit, result.result())

    with _pool(threads) as (pool, workers):
        for unit in units:
            small = _is_small(unit)
            # One more unit than there are workers is started, so that no worker waits. A large unit needs all
            # threads: everything before it is finished first.
            # A finished result is handed on at once: the caller stores it, so an interruption loses little.
            while started and (not small or len(started) > workers or started[0][1].done()):
                finish_oldest()
            if small:
                started.append((unit, pool.submit(work, unit)))
            else:
                on_result(unit, work(unit))
        while started:
            finish_oldest()


@contextmanager
def _pool(threads: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool whose workers share torch's threads, and the number of workers."""
    workers = min(threads, _MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, "condft-unit", _use_threads, (threads // workers,))
    try:
        # torch.set_num_threads sets the number of the calling thread and of every thread that starts later, in any
        # pool: ATen/ParallelOpenMP.cpp keeps it in one global (torch 2.13). So all workers start here, behind a
        # barrier, and the number is set back before anything else runs. The lock is for two calls at once.
        with _STARTING:
            all_started = threading.Barrier(workers + 1)
            for _ in range(workers):
                pool.submit(all_started.wait)
            all_started.wait()
            torch.set_num_threads(threads)
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, units that were not begun are dropped


def _use_threads(count: int) -> None:
    # At its first call, a thread takes over the process's number, and loses what was set before (ATen initializes it
    # lazily, torch 2.13). So the number is read once before it is set.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _is_small(unit: Unit) -> bool:
    matrix = unit.matrix
    return matrix.device.type == "cpu" and min(matrix.shape) <= _SMALL_ORDER and matrix.numel() <= _SMALL_ENTRIES
