"""The output folder of a run: made, refused if it holds a run already, and cleared for another run."""

import shutil
from pathlib import Path

from condft.runtime.process_group import ProcessGroup

__all__ = ["CHECKPOINTS", "METRICS", "RUN_CONTENT", "TENSORBOARD", "prepare_output_dir", "remove_run"]

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
"""What a run writes into its output folder. A folder with any of it holds a run, and `remove_run` deletes no more."""


def prepare_output_dir(output_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Makes the output folder, or refuses one that holds a run.

    Call it in every process, after the Accelerator exists.

    Args:
        output_dir: The folder.
        resume: Accept a run in the folder, to continue it. Remains of a write that was killed are deleted.
        overwrite: Accept a run in the folder, to replace it. It is deleted only by `remove_run`: if the new run
            fails before it writes anything, the old one is still there.

    Raises:
        FileExistsError: The folder holds a run, without `resume` or `overwrite`; or the path is not a folder.
        ValueError: `resume` and `overwrite` are both set.

    >>> folder = prepare_output_dir("runs/first")
    >>> (folder / "metrics.jsonl").touch()
    >>> prepare_output_dir("runs/first")
    Traceback (most recent call last):
    FileExistsError: runs/first already holds a run (metrics.jsonl); continue it with --resume, choose another ...
    """
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite deletes it: give one of them")
    folder = Path(output_dir)
    # in the first process alone; its error is raised in all of them
    ProcessGroup().from_first(lambda: _prepare(folder, resume, overwrite))
    return folder


def _prepare(output_dir: Path, resume: bool, overwrite: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"output_dir {output_dir} is a file; name a folder")
    found = [name for name in RUN_CONTENT if (output_dir / name).exists()]
    if found and not (resume or overwrite):
        raise FileExistsError(
            f"{output_dir} already holds a run ({', '.join(found)}); continue it with --resume, "
            "choose another output_dir, or delete it with --overwrite"
        )
    if resume:
        for remains in (output_dir / CHECKPOINTS).glob(".*"):
            if remains.is_dir():  # hidden files are not ours, but a file manager's for example
                shutil.rmtree(remains)
    output_dir.mkdir(parents=True, exist_ok=True)


def remove_run(output_dir: str | Path) -> None:
    """Deletes the run in a folder, if there is one: `RUN_CONTENT`, and nothing else. Call it in one process only."""
    for name in RUN_CONTENT:
        path = Path(output_dir) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
