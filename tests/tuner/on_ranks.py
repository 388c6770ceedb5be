"""Launches a script on two ranks of this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two(script: str, folder: Path, *, timeout: float = 120) -> None:
    """`script RANK PORT FOLDER` as two processes at once; both must end well.

    Args:
        script: Its name, beside this file.
        folder: Where the processes leave what they found.
        timeout: Seconds that each of them may take.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    processes = [subprocess.Popen([*command, str(rank), port, str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=timeout) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
