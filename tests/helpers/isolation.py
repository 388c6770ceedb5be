"""State that one test must not leave to the next; a conftest imports `alone` to have it around its tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.accelerate_state import forget_accelerate


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """accelerate's state is one per process, and layers this small only wait for a second thread."""
    forget_accelerate()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
