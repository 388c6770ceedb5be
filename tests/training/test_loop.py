"""One stage: the mathematics does not depend on how a batch is divided; what must not train is unchanged."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.retention import SelfDistillation, SelfDistillationConfig
from condft.training import RunConfig, TrainResult, make_accelerator, make_engine, train_stage
from condft.training.loop import self_distillation_batches
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
    """Answers have 1 to 4 tokens, so micro-batches differ in weight: a mean of means would differ."""
    whole, divided = trainee(), trainee()
    size, steps = division
    expected = run(make_config(per_device_batch_size=8), whole, data)
    result = run(make_config(per_device_batch_size=size, gradient_accumulation_steps=steps), divided, data)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    # AdamW divides by the gradient's size, which magnifies rounding where a gradient is nearly zero
    torch.testing.assert_close(trained(divided), trained(whole), rtol=1e-3, atol=1e-4)


def test_the_projector_stage_leaves_the_language_model_alone(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee()
    before, flags = trained(model), {n: p.requires_grad for n, p in model.named_parameters()}
    run(make_config(), model, data, stage=0)
    moved = {name for name, value in trained(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


def test_modes_forward_and_gradients_are_restored(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    model = trainee().eval()
    kept = set(model.__dict__)
    run(make_config(mixed_precision="bf16"), model, data)
    assert set(model.__dict__) == kept
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_is_on_in_every_stage(make_config: MakeConfig, trainee: Any, data: Any) -> None:
    """accelerate's own unwrapping leaves a mark that turns it off from the second stage on."""
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


def test_the_same_seed_gives_the_same_losses(make_config: MakeConfig, trainee: Any, data: Any) -> None:
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


divisions = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(divisions, st.integers(1, 7), st.integers(1, 4), st.integers(1, 9))
def test_a_step_reads_the_same_texts_for_any_division(
    division: tuple[int, int, int], texts: int, every: int, step: int
) -> None:
    size, processes, accumulation = division
    tokens = torch.arange(2 * texts).view(texts, 2)

    def read(size: int, processes: int, accumulation: int) -> list[list[int]]:
        settings = SelfDistillationConfig(every=every, per_device_batch_size=size)
        distillation = SelfDistillation(settings, tokens, SimpleNamespace, seed=4)
        found: list[list[int]] = []
        for process in range(processes):
            accelerator: Any = SimpleNamespace(
                num_processes=processes, process_index=process, gradient_accumulation_steps=accumulation, device="cpu"
            )
            batches = self_distillation_batches(distillation, step, accelerator)
            assert len(batches) == (0 if step % every else accumulation)
            found += [row for batch in batches for row in batch.tolist()]
        return sorted(found)

    assert read(size, processes, accumulation) == read(size * processes * accumulation, 1, 1)
