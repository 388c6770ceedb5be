"""A run's output folder: made, refused where it holds a run already, and cleared for another."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
RUN_CONTENT = (
    CHECKPOINTS,
    METRICS,
    TENSORBOARD,
    "adapter",
    "summary.json",
    "config.yaml",
    "spectral_report.json",
    "condition_numbers.png",
    "training.png",
)
"""What a run leaves in its output folder: the marks of a run, and all that `remove_run` deletes."""


def prepare_output_dir(output_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Makes the output folder, or refuses one that holds a run. Call it on every rank, after the Accelerator exists.

    Args:
        output_dir: The folder.
        resume: A run in there is to be continued: kept, but for the litter of a write that was killed.
        overwrite: A run in there is to go. It stays until `remove_run`: a new one that fails before its first write
            costs nothing.

    Raises:
        FileExistsError: The folder holds a run and neither is asked for, or the path is no folder.
        ValueError: Both are asked for.
    """
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite deletes it: give one of them")
    output_dir = Path(output_dir)
    problem = [None]
    if PartialState().is_main_process:
        problem = [_prepare(output_dir, resume, overwrite)]
    if (message := broadcast_object_list(problem)[0]) is not None:  # all ranks stop, or none
        raise FileExistsError(message)
    return output_dir


def _prepare(output_dir: Path, resume: bool, overwrite: bool) -> Any:
    if output_dir.exists() and not output_dir.is_dir():
        return f"output_dir {output_dir} is a file; name a folder"
    found = [name for name in RUN_CONTENT if (output_dir / name).exists()]
    if found and not (resume or overwrite):
        return (
            f"{output_dir} already holds a run ({', '.join(found)}); continue it with --resume, "
            "choose another output_dir, or delete it with --overwrite"
        )
    if resume:
        for litter in (output_dir / CHECKPOINTS).glob(".*"):
            if litter.is_dir():  # a file is not ours
                shutil.rmtree(litter)
    output_dir.mkdir(parents=True, exist_ok=True)
    return None


def remove_run(output_dir: str | Path) -> None:
    """Deletes the run in a folder, if there is one: `RUN_CONTENT`, and nothing else. Call it on one rank."""
    for name in RUN_CONTENT:
        path = Path(output_dir) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
