"""Checkpoints: whole or absent, of this very run and model, and loaded without running code."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from condft.training import RunConfig, find_checkpoint, prepare_output_dir
from condft.training.checkpoint import load_parameters, load_training_state, save_checkpoint
from condft.training.engines.make import make_engine
from condft.training.stage import build_optimizer, build_schedule, stages_of, trainable_parameters

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def save(make_config: MakeConfig, trainee: Any) -> Callable[..., Any]:
    model = trainee()

    def save(step: int = 4, config: RunConfig | None = None, stage: str = "adapt") -> Any:
        config = config or make_config()
        adapt = stages_of(config)[-1]
        parameters = trainable_parameters(model)
        optimizer = build_optimizer(adapt, parameters, 0.0)
        schedule = build_schedule(optimizer, adapt, config.training)
        sum(p.square().sum() for p in parameters.values()).backward()
        optimizer.step()
        schedule.step()
        checkpoint = save_checkpoint(
            make_engine(Accelerator(cpu=True)),
            parameters,
            optimizer,
            schedule,
            config=config,
            stage=stage,
            step=step,
            global_step=step,
        )
        return checkpoint.path, parameters, optimizer, schedule

    return save


def test_round_trip(save: Any, make_config: MakeConfig, trainee: Any) -> None:
    path, parameters, optimizer, schedule = save()
    expected = torch.rand(3)  # the draw after the checkpoint
    config = make_config()
    checkpoint = find_checkpoint(config, num_processes=1)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.stage, checkpoint.step, checkpoint.global_step) == (path, "adapt", 4, 4)
    fresh_model = trainee()
    fresh = trainable_parameters(fresh_model)
    load_parameters(checkpoint, fresh)
    assert all(torch.equal(fresh[name], value) for name, value in parameters.items())
    adapt = stages_of(config)[-1]
    other = build_optimizer(adapt, fresh, 0.0)
    other_schedule = build_schedule(other, adapt, config.training)
    load_training_state(checkpoint, make_engine(Accelerator(cpu=True)), fresh_model, other, other_schedule)
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert other_schedule.last_epoch == schedule.last_epoch == 1
    assert torch.equal(torch.rand(3), expected)


def test_only_what_is_trained_is_written(save: Any) -> None:
    path, parameters, *_ = save()
    assert load_file(path / "trainable.safetensors").keys() == parameters.keys()
    assert load_file(path / "optimizer.safetensors").keys() == {
        f"{name}/{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")
    }
    files = sorted(file.name for file in path.iterdir())
    assert files == ["optimizer.safetensors", "state.json", "trainable.safetensors", "training.pt"]
    torch.load(path / "training.pt", weights_only=True)  # would refuse anything but tensors and plain values
    state = json.loads((path / "state.json").read_text())
    assert state["config"]["training"]["steps"] == 4
    assert set(state["versions"]) == {"condft", "torch", "transformers", "peft", "accelerate"}


def test_newest_complete_one_counts_and_old_ones_go(save: Any, make_config: MakeConfig) -> None:
    for step in (2, 4, 10):
        path, *_ = save(step)
    folder = path.parent
    assert sorted(p.name for p in folder.iterdir()) == ["00000004-adapt", "00000010-adapt"]
    shutil.copytree(path, folder / ".00000012-adapt-killed")  # a write that a kill cut off keeps its hidden name
    (folder / "00000014-adapt").mkdir()
    checkpoint = find_checkpoint(make_config(), num_processes=1)
    assert checkpoint is not None
    assert checkpoint.path == path
    (folder / ".DS_Store").touch()  # a file manager's, and none of ours
    prepare_output_dir(folder.parent, resume=True)
    assert [path.name for path in folder.glob(".*")] == [".DS_Store"]


def test_a_write_that_fails_leaves_the_last_checkpoint(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, *_ = save(2)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("condft.training.checkpoint.write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(4)
    assert [p.name for p in path.parent.iterdir()] == ["00000002-adapt"]


def test_another_configuration_is_refused_with_both_values(save: Any, make_config: MakeConfig) -> None:
    save()
    changed = make_config(steps=9, schedule="linear")
    with pytest.raises(ValueError, match=r"training\.steps: 4 there, 9 now") as caught:
        find_checkpoint(changed, num_processes=1)
    assert "training.schedule: 'cosine' there, 'linear' now" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    with pytest.raises(ValueError, match=r"taken on 1 processes, this is 2: .* --num_processes 1"):
        find_checkpoint(make_config(), num_processes=2)


def test_another_model_is_refused(save: Any, make_config: MakeConfig) -> None:
    _, parameters, *_ = save()
    checkpoint = find_checkpoint(make_config(), num_processes=1)
    assert checkpoint is not None
    name = next(iter(parameters))
    with pytest.raises(ValueError, match=f"1 parameters differ, first '{name}', .* there and absent here"):
        load_parameters(checkpoint, {key: value for key, value in parameters.items() if key != name})
    with pytest.raises(ValueError, match=r"\(3,\), torch.float32\) here"):
        load_parameters(checkpoint, {**parameters, name: torch.zeros(3)})


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "training.pt", "state.json"])
def test_a_damaged_checkpoint_is_named(save: Any, make_config: MakeConfig, trainee: Any, name: str) -> None:
    path, parameters, optimizer, schedule = save()
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    engine = make_engine(Accelerator(cpu=True))
    with pytest.raises(ValueError, match=rf"00000004-adapt/{name} is damaged .* delete the folder"):
        checkpoint = find_checkpoint(make_config(), num_processes=1)
        assert checkpoint is not None
        load_parameters(checkpoint, parameters)
        load_training_state(checkpoint, engine, trainee(), optimizer, schedule)
