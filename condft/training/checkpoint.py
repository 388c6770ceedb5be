"""Checkpoints: trained parameters, optimizer state and the random states of all processes; complete or absent.

    OUTPUT/checkpoints/00000120-adapt/     the run's optimizer steps so far, and the stage they ended in
        trainable.safetensors              the trained parameters by name; frozen ones are never written
        optimizer.safetensors              the optimizer's state, `<parameter>/<key>`
        training.pt                        learning rates, schedule, loss scaler and random states
        state.json                         stage, step, config, fingerprint, inputs, versions

Tensors are whole on every engine: the processes gather sharded ones, one at a time, and the main process writes them.
The `.pt` file holds tensors and plain values only and is read with `weights_only=True`: loading runs no code.
"""

import io
import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from condft.files.atomic import atomic_directory, write_json
from condft.training.config import RunConfig, flatten
from condft.training.engines.base import Engine
from condft.training.engines.sharding import whole
from condft.training.output_dir import CHECKPOINTS

__all__ = [
    "Checkpoint",
    "find_checkpoint",
    "load_parameters",
    "load_trained",
    "load_training_state",
    "save_checkpoint",
]

# Eight digits or more: the names are padded for sorted listings, and a longer run is still found.
_FOLDER = re.compile(r"\d{8,}-\w+")
_WEIGHTS, _OPTIMIZER = "trainable.safetensors", "optimizer.safetensors"
_TRAINING, _STATE = "training.pt", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its folder.
        stage: The stage it was taken in.
        step: Optimizer steps done in that stage.
        global_step: Optimizer steps done in the whole run.
        inputs: Hashes of inputs that the configuration only names, such as `training data`.
    """

    path: Path
    stage: str
    step: int
    global_step: int
    inputs: Mapping[str, str] = field(default_factory=dict)

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Compares the run's inputs with those that the checkpoint was taken with.

        Args:
            inputs: Hashes, by name. Only these names are compared.

        Raises:
            ValueError: An input differs. The message names all that do.

        >>> checkpoint = Checkpoint(Path("run"), "adapt", 4, 7, inputs={"training data": "1f3a"})
        >>> checkpoint.check_inputs({"training data": "1f3a"})
        >>> checkpoint.check_inputs({"training data": "99b0"})
        Traceback (most recent call last):
        ValueError: run was taken with another training data under the same name. Restore ...
        """
        if changed := [name for name, digest in inputs.items() if self.inputs.get(name) != digest]:
            raise ValueError(
                f"{self.path} was taken with another {' and another '.join(changed)} under the same name. Restore "
                "what it was taken with, choose another output_dir, or start again with --overwrite."
            )


def save_checkpoint(
    engine: Engine,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    config: RunConfig,
    stage: str,
    step: int,
    global_step: int,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> Checkpoint:
    """Writes a checkpoint into `config.output_dir` and deletes old ones. Call it in every process.

    Args:
        engine: Gathers sharded tensors.
        parameters: All parameters that the run trains, by name, including those that this stage does not train.
        optimizer: The stage's optimizer.
        scheduler: The stage's learning rate schedule.
        config: Written into the checkpoint, and compared when a run resumes.
        stage: Name of the stage.
        step: Optimizer steps done in the stage.
        global_step: Optimizer steps done in the run.
        inputs: Written into the checkpoint, and compared when a run resumes: see `Checkpoint.check_inputs`.

    Returns:
        The checkpoint.
    """
    accelerator = engine.accelerator
    folder = Path(config.output_dir) / CHECKPOINTS
    target = folder / f"{global_step:08d}-{stage}"
    # Both are collective, so every process makes these calls before the main process writes alone.
    random_states = gather_object([_random_state()])
    weights, states = _gather(engine, parameters, optimizer)
    if accelerator.is_main_process:
        with atomic_directory(target) as temporary:
            save_file(weights, temporary / _WEIGHTS, metadata={"format": "pt"})
            save_file(states, temporary / _OPTIMIZER, metadata={"format": "pt"})
            training_state = {
                # The settings of each group alone: the parameters are in the files above, by name.
                "groups": [{**group, "params": None} for group in optimizer.param_groups],
                "scheduler": scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "random": random_states,
            }
            torch.save(training_state, temporary / _TRAINING)
            state = {
                "stage": stage,
                "step": step,
                "global_step": global_step,
                "num_processes": accelerator.num_processes,
                "fingerprint": config.fingerprint(),
                "config": config.to_dict(),
                "inputs": dict(inputs),
                # For people who look into a run; a resumed run does not compare them.
                "versions": {
                    name: version(name) for name in ("condft", "torch", "transformers", "peft", "accelerate")
                },
            }
            write_json(temporary / _STATE, state)
        # After the new one is complete, so that at least one complete checkpoint exists at every moment.
        for old in _complete_folders(folder)[: -config.training.keep_checkpoints]:
            shutil.rmtree(old)
    # No process goes on before the checkpoint exists: what it returns can be read everywhere.
    accelerator.wait_for_everyone()
    return Checkpoint(target, stage, step, global_step, dict(inputs))


def _gather(
    engine: Engine, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights and optimizer state on the CPU of the main process. The others take part and return nothing."""
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    keep = engine.accelerator.is_main_process
    # Collective: every process gathers the same parameters in the same order, one at a time, to save memory.
    for name, parameter in parameters.items():
        weight = whole(parameter)
        state = engine.whole_state(optimizer, parameter)
        if keep:
            # copies: ZeRO-2 keeps parameters as views of one buffer, which safetensors refuses to write
            weights[name] = _on_cpu(weight)
            states |= {f"{name}/{key}": _on_cpu(value) for key, value in state.items()}
    return weights, states


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def find_checkpoint(config: RunConfig, *, num_processes: int) -> Checkpoint | None:
    """The newest complete checkpoint in `config.output_dir`; None if there is none yet.

    Args:
        config: The run.
        num_processes: Number of processes of this launch.

    Raises:
        ValueError: It was taken with another configuration (each differing key is named with both values) or on
            another number of processes; or its `state.json` is damaged.

    >>> from condft.training import load_config
    >>> find_checkpoint(load_config("run.yaml"), num_processes=1) is None  # nothing has run yet
    True
    """
    folders = _complete_folders(Path(config.output_dir) / CHECKPOINTS)
    if not folders:
        return None
    path = folders[-1]
    with _intact(path / _STATE) as file:
        state = json.loads(file.read_bytes())
    if state["fingerprint"] != config.fingerprint():
        then, now = flatten(state["config"]), flatten(config.to_dict())
        differences = [
            f"  {key}: {then.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
            for key in config.diff(state["config"])
        ]
        raise ValueError(
            f"{path} was taken with another configuration:\n" + "\n".join(differences) + "\n"
            "Resume with the values it was taken with, choose another output_dir, or start again with --overwrite."
        )
    if state["num_processes"] != num_processes:
        raise ValueError(
            f"{path} was taken on {state['num_processes']} processes, this is {num_processes}: the global batch would "
            f"differ. Launch with --num_processes {state['num_processes']}, or start again with --overwrite."
        )
    return Checkpoint(path, state["stage"], state["step"], state["global_step"], state["inputs"])


def load_parameters(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    """Copies the checkpoint's values into the model's trained parameters, in place, before anything is sharded.

    Raises:
        ValueError: Names, shapes or dtypes differ, so the model was built differently; or the file is damaged.
    """
    saved = load_trained(checkpoint)
    # All are compared before any is copied: a checkpoint that does not fit leaves the model unchanged.
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    present = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()}
    if stored != present:
        differing = sorted(name for name in stored.keys() | present.keys() if stored.get(name) != present.get(name))
        first = differing[0]
        raise ValueError(
            f"{checkpoint.path} does not fit the model: {len(differing)} parameters differ, first {first!r}, "
            f"{stored.get(first, 'absent')} there and {present.get(first, 'absent')} here. The base model or the "
            "selection changed; restore them, or start again with --overwrite."
        )
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(saved[name])


def load_trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, whole, by name.

    Raises:
        ValueError: The file is damaged.
    """
    with _intact(checkpoint.path / _WEIGHTS) as file:
        return load_file(file)


def load_training_state(
    checkpoint: Checkpoint, engine: Engine, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> None:
    """Restores optimizer, schedule, loss scaler and this process's random states.

    Call it right before the next step: anything that draws random numbers in between changes them.

    Args:
        checkpoint: The checkpoint.
        engine: Cuts each process's shard of the optimizer's state.
        model: The model as the engine prepared it, whose parameters the optimizer has.
        optimizer: The stage's optimizer.
        scheduler: The stage's learning rate schedule.

    Raises:
        ValueError: A file is damaged.
    """
    accelerator = engine.accelerator
    with _intact(checkpoint.path / _TRAINING) as path:
        # From bytes: for a truncated file, torch.load raises an OSError, as for a disk that fails.
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    # The groups hold the current learning rates. The schedule's own state, restored below, does not set them.
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    with _intact(checkpoint.path / _OPTIMIZER) as path:
        opened = safe_open(path, framework="pt")
    with opened as file:
        keys: dict[str, list[str]] = defaultdict(list)
        for key in file.keys():  # noqa: SIM118 - a handle, not a mapping
            name, _, part = key.rpartition("/")
            keys[name].append(part)
        for name, parameter in model.named_parameters():
            # Parameters that this stage does not train have no state in the file.
            if name in keys:
                whole_state = {part: file.get_tensor(f"{name}/{part}") for part in keys[name]}
                engine.set_state(optimizer, parameter, whole_state)
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    # Last, and by process: each has drawn its own numbers, for example for dropout.
    _set_random_state(state["random"][accelerator.process_index])


@contextmanager
def _intact(path: Path) -> Iterator[Path]:
    """Names the file that cannot be read: the errors of the libraries say what is wrong, but not in which file."""
    try:
        yield path
    # Not OSError: a disk that fails does not mean that the file is damaged.
    except (SafetensorError, UnpicklingError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete the folder {path.parent.name}, and --resume takes the checkpoint "
            "before it; or start again with --overwrite."
        ) from error


def _complete_folders(folder: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first. A write in progress has another, hidden name."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and (path / _STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[0]))


def _random_state() -> dict[str, Any]:
    """This process's random states as tensors and plain values, which `weights_only=True` accepts."""
    # the global state: libraries draw from it
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
