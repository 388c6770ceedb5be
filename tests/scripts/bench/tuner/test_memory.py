"""The peak of what torch allocates."""

import torch
from torch import Tensor

from scripts.bench.tuner.memory import peak_allocated


def test_the_peak_is_what_lives_at_a_time() -> None:
    def work() -> Tensor:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)
        del second
        return third

    assert peak_allocated(work) == 3_000_000


def test_what_an_earlier_profile_left_behind_does_not_count() -> None:
    """torch's counter goes on in one process, and memory freed outside of a profile stays in it."""
    left: list[Tensor] = []
    peak_allocated(lambda: left.append(torch.empty(700_000, dtype=torch.uint8)))
    left.clear()
    assert peak_allocated(lambda: torch.empty(300_000, dtype=torch.uint8)) == 300_000
