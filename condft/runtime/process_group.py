"""The processes of torch.distributed that work together: the one place that asks for rank and world size.

A single process is the case of a group of one, so no caller needs two paths. What the processes send each other are
small Python objects (names, hashes, rows), through object collectives, which work with gloo and nccl. All processes
make the same calls in the same order, also when one of them fails: its error is sent to the others, which would
otherwise wait forever, and raised on all.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

__all__ = ["ProcessGroup"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    error: Exception


class ProcessGroup:
    """The processes that work together.

    It asks torch, not accelerate: a `PartialState` made here would fix the device before the trainer chooses it.

    Args:
        shared: False makes a group of this process alone, also under torch.distributed.

    Attributes:
        size: The world size: 1 without torch.distributed.
        rank: The rank of this process: 0 without torch.distributed.

    >>> group = ProcessGroup()
    >>> group.size, group.rank, group.first
    (1, 0, True)
    >>> group.run(lambda: "the result of one process")
    ['the result of one process']
    """

    def __init__(self, *, shared: bool = True) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.size = torch.distributed.get_world_size() if shared and distributed else 1
        self.rank = torch.distributed.get_rank() if self.size > 1 else 0

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes files and shows progress."""
        return self.rank == 0

    def run(self, work: Callable[[], T]) -> list[T]:
        """Does this process's work and returns the result of every process, by rank.

        Args:
            work: May fail on any process. Its result must be picklable.

        Raises:
            Exception: The error of the lowest rank that had one, on every process.
        """
        try:
            own = work()
        except Exception as error:
            # Also a process that failed takes part in the gather: the others wait in it.
            outcomes = self._gather(_Failure(_portable(error)))
            lowest = next(index for index, outcome in enumerate(outcomes) if isinstance(outcome, _Failure))
            if lowest == self.rank:  # its own error, with the traceback and the class that it has here
                raise
            raise outcomes[lowest].error from error
        outcomes = self._gather(own)
        # By rank, so that every process raises the same error: that of the lowest.
        for outcome in outcomes:
            if isinstance(outcome, _Failure):
                raise outcome.error
        return outcomes

    def from_first(self, work: Callable[[], T]) -> T:
        """Does the work on the first process alone and returns its result on every process."""
        return cast(T, self.run(work if self.first else lambda: None)[0])

    def barrier(self) -> None:
        """Waits until every process has come this far; files that the others wrote before are then there."""
        self._gather(None)

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


def _portable(error: Exception) -> Exception:
    """The error if pickling keeps it whole, else a RuntimeError with its message.

    An exception of a local class, or one whose constructor takes other arguments than its message, does not survive.
    """
    try:
        copied = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(str(error))
    return error if str(copied) == str(error) else RuntimeError(str(error))
