"""Work on many small matrices side by side: a core each, since one of them cannot keep several busy.

A matrix product of order 600 takes as long on two threads as on one and a half; on as many matrices at once as there
are cores, none waits for another. Large matrices come one after another, on all threads.
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
_SMALL_ENTRIES = 2**22  # values of one unit more than there are workers are in memory together
_MOST_WORKERS = 8  # more of them wait for Python's lock; they share the threads that are left over
_STARTING = threading.Lock()


def thread_map(units: Iterable[Unit], work: Callable[[Unit], T], done: Callable[[Unit, T], None]) -> None:
    """Does the work of every unit; of small ones on the CPU several at a time, in threads of their own.

    Args:
        units: With their values in memory. They are asked for when there is a worker for them.
        work: Called from this thread or another one, so it must not change what is shared.
        done: Called with units and results, in the order of the units, in this thread, as soon as may be.

    Raises:
        Exception: What the work raises, at its unit's turn; later units may have been begun.
    """
    with _STARTING:
        threads = torch.get_num_threads()
    if threads == 1:
        for unit in units:
            done(unit, work(unit))
        return
    begun: deque[tuple[Unit, Future[T]]] = deque()

    def hand_on() -> None:
        unit, result = begun.popleft()
        done(unit, result.result())

    with _pool(threads) as (pool, workers):
        for unit in units:
            small = _is_small(unit)
            # One more than there are workers is begun, so that none has to wait; a large one wants all threads.
            while begun and (not small or len(begun) > workers or begun[0][1].done()):
                hand_on()
            if small:
                begun.append((unit, pool.submit(work, unit)))
            else:
                done(unit, work(unit))
        while begun:
            hand_on()


@contextmanager
def _pool(threads: int) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool that shares torch's threads between its workers, and how many these are."""
    workers = min(threads, _MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, "condft-unit", _take_threads, (threads // workers,))
    try:
        # What one thread sets is also what threads to come start with, whoever starts them. So all workers begin
        # here, and the setting is put back before anything else goes on.
        with _STARTING:
            everyone = threading.Barrier(workers + 1)
            for _ in range(workers):
                pool.submit(everyone.wait)
            everyone.wait()
            torch.set_num_threads(threads)
        yield pool, workers
    finally:
        pool.shutdown(cancel_futures=True)


def _take_threads(count: int) -> None:
    # A thread takes the process's number at its first question, whatever it was set to before: so ask first.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _is_small(unit: Unit) -> bool:
    matrix = unit.matrix
    return matrix.device.type == "cpu" and min(matrix.shape) <= _SMALL_ORDER and matrix.numel() <= _SMALL_ENTRIES
