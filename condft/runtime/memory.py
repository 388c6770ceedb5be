"""How much memory this process has had."""

import resource
import sys
from pathlib import Path

__all__ = ["peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """Largest resident memory of this process's program so far, in bytes."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux, where getrusage also counts what a child was before it became this program: its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes
