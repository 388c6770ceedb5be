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
