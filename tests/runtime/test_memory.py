"""Peak memory is that of the program that asks, not of the process that started it."""

import subprocess
import sys

import torch

from condft.runtime.memory import peak_rss_bytes

_MIB = 2**20


def test_a_child_does_not_inherit_its_parent_s_peak():
    """`getrusage` in a child started by fork and exec gives at least what the parent held at that time."""
    held = torch.ones(400 * _MIB // 4)
    program = "from condft.runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
    assert 2 * _MIB < child < 200 * _MIB
    assert peak_rss_bytes() > held.nbytes
