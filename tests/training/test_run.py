"""Whole runs: files, interruption and resume bit for bit, and the same mathematics on two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from condft.training import RunConfig, TrainResult, find_checkpoint, make_accelerator, make_engine, read_metrics, train

MakeConfig = Callable[..., RunConfig]


def run(config: RunConfig, model: Any, data: Any, resume: bool = False) -> list[TrainResult]:
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    engine = make_engine(make_accelerator(config, cpu=True))
    return train(
        engine, model, *data, config, resume_from=find_checkpoint(config, num_processes=1) if resume else None
    )


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Killed(BaseException):
    """Like KeyboardInterrupt: no code catches it."""


def kill_after(data: Any, micro_batches: int) -> Any:
    examples, collate = data
    calls = iter(range(micro_batches))

    def killing(batch: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return collate(batch)

    return examples, killing


def test_a_run_leaves_metrics_events_and_checkpoints(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    config = make_config(log_every=2)
    results = run(config, trainee(), data)
    output = Path(config.output_dir)
    records = read_metrics(output / "metrics.jsonl")
    assert [(r["global_step"], r["stage"], r["step"]) for r in records] == [
        *((step, "projector", step) for step in (1, 2, 3)),
        *((step + 3, "adapt", step) for step in (1, 2, 3, 4)),
    ]
    assert [r["loss"] for r in records] == [*results[0].losses, *results[1].losses]
    assert [result.stage for result in results] == ["projector", "adapt"]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["00000003-projector", "00000007-adapt"]
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("adapt/loss")] == [5, 7]
    assert events.Scalars("adapt/loss")[-1].value == pytest.approx(results[1].final_loss)
    assert "adapt/learning_rate/language_model" in events.Tags()["scalars"]


@pytest.mark.parametrize("killed_in_step", [1, 3, 4, 6, 7])
def test_an_interrupted_run_resumes_bit_for_bit(
    make_config: MakeConfig, trainee: Any, data: Any, killed_in_step: int, tmp_path: Path
) -> None:
    """Stage 1 has steps 1 to 3, stage 2 steps 4 to 7; dropout makes the random states count."""
    config = make_config(checkpoint_every=2, gradient_accumulation_steps=2)
    whole = config.model_copy(update={"output_dir": str(tmp_path / "whole")})
    model = trainee(dropout=0.2)
    expected = run(whole, model, data)

    with pytest.raises(Killed):
        run(config, trainee(dropout=0.2), kill_after(data, 2 * (killed_in_step - 1) + 1))
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"torn')
    torch.rand(5)  # the new process has drawn other numbers before
    resumed = trainee(dropout=0.2)
    results = run(config, resumed, data, resume=True)
    assert [result.losses for result in results] == [result.losses for result in expected]
    assert all(torch.equal(value, trained(model)[name]) for name, value in trained(resumed).items())
    kept, again = (read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (whole, config))
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in kept]


def test_resuming_a_finished_run_trains_nothing(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    config = make_config()
    model = trainee()
    expected = run(config, model, data)
    again = trainee()
    assert run(config, again, (data[0], None), resume=True) == expected
    assert all(torch.equal(value, trained(model)[name]) for name, value in trained(again).items())


def test_resume_with_nothing_to_resume_starts(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    assert len(run(make_config(), trainee(), data, resume=True)[1].losses) == 4


def test_a_checkpoint_of_more_processes_is_refused(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    config = make_config()
    run(config, trainee(), data)
    state = Path(config.output_dir) / "checkpoints" / "00000007-adapt" / "state.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    with pytest.raises(ValueError, match="was taken on 2 processes, this is 1"):
        run(config, trainee(), data, resume=True)
