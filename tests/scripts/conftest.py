"""The scripts are no package: they are run by path and find their siblings there, so the tests do the same."""

import sys
from pathlib import Path

import pytest
import torch

from tests.accelerate_state import forget_accelerate

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))


@pytest.fixture(autouse=True)
def _alone() -> None:
    """accelerate's state is one a process; layers this small only wait for a second thread."""
    forget_accelerate()
    torch.set_num_threads(1)
