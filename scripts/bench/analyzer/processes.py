"""Two gloo processes share the analysis of one Llama-3-8B layer: is the report the same, and the work halved?

Work is CPU time of the process (one thread each): other processes stretch it less than wall time.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from condft.analysis.analyze import analyze
from condft.report import SpectralReport

__all__ = ["shared_by_two"]


def shared_by_two(model: nn.Module) -> dict[str, Any]:
    """CPU seconds of each of two processes against a single one's, and whether the reports are the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world in (1, 2):
            mp.spawn(_on_rank, (world, model, folder), nprocs=world)
        figures = {
            (world, rank): json.loads((folder / f"{world}-{rank}.json").read_text())
            for world in (1, 2)
            for rank in range(world)
        }
        reports = {key: SpectralReport.load(folder / f"report-{key[0]}-{key[1]}.json") for key in figures}
    alone = figures[1, 0]["cpu_seconds"]
    shares = [figures[2, rank]["cpu_seconds"] / alone for rank in range(2)]
    return {
        "cpu_seconds_alone": alone,
        "share_by_rank": shares,
        "within_20_percent_of_half": all(abs(share - 0.5) <= 0.1 for share in shares),
        "seconds_alone": figures[1, 0]["seconds"],
        "seconds_shared": max(figures[2, rank]["seconds"] for rank in range(2)),
        "identical": reports[1, 0].rows == reports[2, 0].rows == reports[2, 1].rows,
    }


def _on_rank(rank: int, world: int, model: nn.Module, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    analyze(nn.Linear(300, 100), progress=False, cache=False)  # libraries warm
    torch.distributed.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    report = analyze(model, progress=False, cache=False)
    figures = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - began}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(figures))
    report.save(folder / f"report-{world}-{rank}.json")
    torch.distributed.destroy_process_group()
