"""Peak memory of training steps, counted at torch's allocator, each contestant in a process of its own.

    python -m scripts.bench.tuner.memory WORK CONTESTANT UNITS.json    # prints a JSON object

What torch allocates is the same in every run, so that a difference of 2 % is visible. The process's peak resident
memory is recorded too; it also holds libraries, the allocator's slack and files in memory.
"""

import copy
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils.logging import disable_progress_bar

from condft.runtime.memory import peak_rss_bytes
from scripts.bench.tuner.models import Adapted, UnfrozenByHand, batch, entries_of, moe, smollm2

__all__ = ["MEMORY_WORK", "memory", "peak_allocated"]

STEPS = 2  # the second one has the optimizer's state from its start
TOKENS = 512
MEMORY_WORK: dict[str, Callable[[], Any]] = {
    "smollm2 bfloat16": lambda: smollm2(torch.bfloat16),
    "smollm2 float32": smollm2,
    "mixtral bfloat16": lambda: moe("mixtral", "grouped_mm", torch.bfloat16),
    "olmoe bfloat16": lambda: moe("olmoe", "grouped_mm", torch.bfloat16),
}
CONTESTANTS: dict[str, Callable[[Any, Sequence[str]], Adapted]] = {
    "condft": Adapted.by_condft,
    "unfrozen": UnfrozenByHand,
}


def peak_allocated(work: Callable[[], Any]) -> int:
    """The most bytes alive at one time of what `work` allocates through torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not memory:
        return 0
    # torch's counter is the process's: what an earlier profile counted, and was freed after it, is still in it.
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in memory) - before


def measured(work: str, contestant: str, units: Sequence[str]) -> dict[str, int]:
    """In this process: bytes at the peak, and numbers that the optimizer keeps."""
    bases = [MEMORY_WORK[work]()]
    ids = batch(bases[0], TOKENS)

    def train() -> Adapted:
        base = copy.deepcopy(bases.pop())  # so that the base's own bytes count, though it may come from a mapped file
        trained = CONTESTANTS[contestant](base, units)
        del base
        gc.collect()
        for _ in range(STEPS):
            trained.step(ids)
        return trained

    kept: list[Adapted] = []
    peak = peak_allocated(lambda: kept.append(train()))
    return {
        "peak_bytes": peak,
        "peak_rss_bytes": peak_rss_bytes(),
        "optimizer_entries": kept[0].optimizer_entries(),
    }


def memory(work: str, units: Sequence[str], *, tick: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Each contestant in a fresh process; the ratio, and what the optimizer keeps against twice the selection."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "units.json"
        path.write_text(json.dumps(list(units)))
        for contestant in CONTESTANTS:
            command = [sys.executable, "-m", "scripts.bench.tuner.memory", work, contestant, str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[contestant] = json.loads(output.splitlines()[-1])
            tick()
    selected = entries_of(MEMORY_WORK[work](), units)
    return {
        "work": work,
        "tokens": TOKENS,
        "selected_entries": selected,
        **found,
        "ratio": found["condft"]["peak_bytes"] / found["unfrozen"]["peak_bytes"],
        "rss_ratio": found["condft"]["peak_rss_bytes"] / found["unfrozen"]["peak_rss_bytes"],
        # AdamW: two moments of every number that trains, and of nothing else.
        "optimizer_state_exact": found["condft"]["optimizer_entries"] == 2 * selected,
    }


if __name__ == "__main__":
    disable_progress_bar()
    work, contestant, units = sys.argv[1:]
    print(json.dumps(measured(work, contestant, json.loads(Path(units).read_text()))))
