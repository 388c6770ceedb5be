"""State that one test must not leave to the next. A conftest imports `alone` to have it around its tests."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

__all__ = ["alone", "forget_accelerate"]


def forget_accelerate() -> None:
    """Clears accelerate's state, which is one for each process: the next Accelerator starts without it."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A test with fresh accelerate state, on one thread: layers this small only wait for a second one."""
    forget_accelerate()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
