"""One stage: the mathematics does not depend on how a batch is divided; what must not be trained is not touched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from condft.training import RunConfig, TrainResult, make_accelerator, make_engine, train_stage
from condft.training.stage import stages_of

MakeConfig = Callable[..., RunConfig]


def run(config: RunConfig, model: Any, data: Any, stage: int = -1, **options: Any) -> TrainResult:
    accelerator = make_accelerator(config, cpu=True)
    return train_stage(make_engine(accelerator), model, *data, stages_of(config)[stage], config.training, **options)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_loss_falls_and_nothing_frozen_moves(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = run(make_config(steps=30, per_device_batch_size=11), model, data)
    assert result.steps == len(result.losses) == 30
    assert result.final_loss == result.losses[-1] < result.losses[0] - 0.3
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)


def test_first_loss_is_the_mean_over_answer_tokens(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    examples, collate = data
    expected = trainee().eval()(**collate(examples)).loss.item()
    result = run(make_config(steps=1, per_device_batch_size=11), trainee(), data)
    assert result.losses == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("division", [(4, 2), (2, 4), (1, 8)])
def test_accumulation_does_not_change_the_mathematics(
    make_config: MakeConfig, trainee: Any, data: Any, division: tuple[int, int]
) -> None:
    """Answers have 1 to 4 tokens, so micro-batches differ in weight: a mean of means would be seen."""
    whole, divided = trainee(), trainee()
    size, steps = division
    expected = run(make_config(per_device_batch_size=8), whole, data)
    result = run(make_config(per_device_batch_size=size, gradient_accumulation_steps=steps), divided, data)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    # AdamW divides by the gradient's size, which blows rounding up where a gradient is all but zero
    torch.testing.assert_close(trained(divided), trained(whole), rtol=1e-3, atol=1e-4)


def test_the_projector_stage_leaves_the_language_model_alone(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee()
    before, flags = trained(model), {n: p.requires_grad for n, p in model.named_parameters()}
    run(make_config(), model, data, stage=0)
    moved = {name for name, value in trained(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


def test_the_model_comes_back_as_it_was(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee().eval()
    kept = set(model.__dict__)
    run(make_config(mixed_precision="bf16"), model, data)
    assert set(model.__dict__) == kept
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_is_on_in_every_stage(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    """accelerate's own unwrapping leaves a mark that would turn it off from the second stage on."""
    model, config = trainee(), make_config(mixed_precision="bf16")
    accelerator = make_accelerator(config, cpu=True)
    for stage in stages_of(config):
        dtypes = set()
        hook = model.get_output_embeddings().register_forward_hook(lambda m, i, out, seen=dtypes: seen.add(out.dtype))
        train_stage(make_engine(accelerator), model, *data, stage, config.training)
        hook.remove()
        assert dtypes == {torch.bfloat16}


def test_records_name_rates_norm_and_tokens(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    records: list[Any] = []
    run(make_config(schedule="constant"), trainee(), data, on_step=records.append)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["learning_rate"]["language_model"] for record in records] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert all(record["grad_norm"] > 0 and record["tokens"] >= 4 and record["seconds"] > 0 for record in records)


def test_null_clips_nothing(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    free, loose, tight = trainee(), trainee(), trainee()
    for model, limit in ((free, None), (loose, 1e9), (tight, 1e-9)):
        run(make_config(max_grad_norm=limit), model, data)
    assert all(torch.equal(value, trained(loose)[name]) for name, value in trained(free).items())
    assert not all(torch.equal(value, trained(tight)[name]) for name, value in trained(free).items())


def test_same_seed_same_losses_whatever_was_drawn_before(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    first = run(make_config(), trainee(dropout=0.2), data).losses
    torch.rand(7)
    assert run(make_config(), trainee(dropout=0.2), data).losses == first


def test_a_loss_that_is_not_finite_stops_before_the_step(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    examples, collate = data
    examples[3] = {**examples[3], "features": examples[3]["features"] * float("nan")}
    model = trainee()
    before = trained(model)
    config = make_config(per_device_batch_size=1, gradient_accumulation_steps=11)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1 of stage 'adapt', .* examples \[\[3\]\]"):
        run(config, model, (examples, collate))
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_a_gradient_that_is_not_finite_stops_before_the_step(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee()
    before = trained(model)
    model.get_parameter(next(name for name in before if "projector" in name)).register_hook(lambda g: g * float("inf"))
    with pytest.raises(ValueError, match=r"the gradient norm is (inf|nan) at step 1"):
        run(make_config(), model, data)
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_examples_without_answers_are_named(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    examples, collate = data
    examples[5] = {**examples[5], "answer": torch.empty(0, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"training examples \[5\] have no answer token"):
        run(make_config(per_device_batch_size=1, steps=11), trainee(), (examples, collate))


def test_engines_that_it_does_not_know_are_refused(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    config = make_config()
    accelerator = make_accelerator(config, cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="not on FSDP version 1: set fsdp_version: 2"):
        train_stage(make_engine(accelerator), trainee(), *data, stages_of(config)[0], config.training)


def test_accumulation_of_the_launcher_does_not_win(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    config = make_config(gradient_accumulation_steps=4)
    assert make_accelerator(config, cpu=True).gradient_accumulation_steps == 4
