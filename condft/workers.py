"""Work on many small matrices side by side: a core each, since one of them cannot keep several busy.

A matrix product of order 600 takes as long on two threads as on one and a half; on as many matrices at once as there
are cores, none waits for another. Large matrices come one after another, on all threads.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from condft.units import Unit

__all__ = ["side_by_side"]

T = TypeVar("T")

_SMALL_ORDER = 1024
_SMALL_ENTRIES = 2**22  # values of as many units as there are workers are in memory together
# torch's number of threads is the process's: analyses in several threads take turns, or one would change another's.
_TURN = threading.Lock()
_MOST_WORKERS = 8  # more of them wait for Python's lock; they share the threads that are left over


def side_by_side(units: Iterable[Unit], work: Callable[[Unit], T]) -> Iterator[tuple[Unit, T]]:
    """Does the work of every unit; of small ones on the CPU several at a time, in threads of their own.

    Args:
        units: With their values in memory. They are asked for when there is a worker for them.
        work: Called from this thread or another one, so it must not touch what is shared.

    Yields:
        Units and results, in the order of the units, in the caller's thread.

    Raises:
        Exception: What the work raises, at its unit's turn; later units may have been begun.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for unit in units:
            yield unit, work(unit)
        return
    with _TURN:
        yield from _in_workers(units, work, threads)


def _in_workers(units: Iterable[Unit], work: Callable[[Unit], T], threads: int) -> Iterator[tuple[Unit, T]]:
    workers = min(threads, _MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, "condft-unit", torch.set_num_threads, (threads // workers,))
    begun: deque[tuple[Unit, Future[T]]] = deque()
    try:
        for unit in units:
            if _is_small(unit):
                # What is done is handed on at once, so that little is lost if all ends here; else one more than there
                # are workers is begun, so that none has to wait.
                while begun and (len(begun) > workers or begun[0][1].done()):
                    first, result = begun.popleft()
                    yield first, result.result()
                begun.append((unit, pool.submit(work, unit)))
                continue
            while begun:
                first, result = begun.popleft()
                yield first, result.result()
            yield unit, work(unit)
        while begun:
            first, result = begun.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' own setting is also what threads to come would start with


def _is_small(unit: Unit) -> bool:
    matrix = unit.matrix
    return matrix.device.type == "cpu" and min(matrix.shape) <= _SMALL_ORDER and matrix.numel() <= _SMALL_ENTRIES
