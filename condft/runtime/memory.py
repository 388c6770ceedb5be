"""How much memory this process has had."""

import resource
import sys
from pathlib import Path

__all__ = ["peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since its program started, in bytes.

    >>> peak_rss_bytes() > 1_000_000
    True
    """
    status = Path("/proc/self/status")
    # On Linux a new process inherits the peak of its parent in getrusage: it was a copy of the parent before exec.
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024  # the kernel's "kB" is 1024 bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes
