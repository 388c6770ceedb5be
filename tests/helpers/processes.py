"""Launches a worker script as two processes on this machine, and ends such a process."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "tests" / "workers"


def run_two(script: str, folder: Path, *, timeout: float = 120) -> None:
    """`script RANK PORT FOLDER` as two processes at once; both must end well.

    Args:
        script: Its name in tests/workers.
        folder: Where the processes write their results.
        timeout: Seconds that each of them may take.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(WORKERS / script)]
    processes = [subprocess.Popen([*command, str(rank), port, str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=timeout) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def leave() -> NoReturn:
    """Ends this process with status 0, without finalizing the interpreter; its files must be closed.

    FSDP2 and DDP keep their process group alive past `destroy_process_group` (torch 2.13), and with it gloo's threads.
    If one of them frees its last tensor only then, it needs the GIL, is cut off by the interpreter's end, and the
    process aborts ("terminate called without an active exception").
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
