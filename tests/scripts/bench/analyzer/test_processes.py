"""Two real processes share an analysis."""

import pytest
from torch import nn

from scripts.bench.analyzer.processes import shared_by_two


@pytest.mark.multiprocess
def test_two_processes_give_one_report() -> None:
    found = shared_by_two(nn.Sequential(*(nn.Linear(40, 30, bias=False) for _ in range(4))))
    assert found["identical"]
    assert len(found["share_by_rank"]) == 2
