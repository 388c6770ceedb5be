"""Self-distillation in training: in the loop of condft, and in the Trainer of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from condft import CondFTConfig
from condft.retention import SelfDistillation, SelfDistillationConfig, kl_to_base, sample_from_base
from condft.training import (
    RunConfig,
    make_accelerator,
    make_engine,
    prepare_output_dir,
    read_metrics,
    train,
    train_stage,
)
from condft.training.stage import stages_of
from tests.helpers.models.distilled import TEXTS, distill, disturb
from tests.helpers.models.tiny_llama import build_tiny_llama

KL = "self_distillation_kl"


def run(config: RunConfig, model: Any, data: Any, **options: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    engine, stage = make_engine(make_accelerator(config, cpu=True)), stages_of(config)[-1]
    train_stage(engine, model, *data, stage, config.training, on_step=records.append, **options)
    return records


def test_a_due_step_has_both_gradients(make_config: Callable[..., RunConfig], condft_trainee: Any, data: Any) -> None:
    model, alone = condft_trainee(), condft_trainee()
    for each in (model, alone):
        disturb(each)
    config = make_config(steps=1, per_device_batch_size=11)
    examples, collate = data
    (model(**collate(examples)).loss + 3.0 * distill(model).kl_to_base(model, model, TEXTS)).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    distillation = distill(alone, weight=3.0, every=1, per_device_batch_size=5)
    (record,) = run(config, alone, data, distillation=distillation)
    assert record["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert record["self_distillation_kl"] == pytest.approx(
        kl_to_base(model, TEXTS, model.disable_adapter, progress=False), rel=1e-5
    )


@pytest.mark.parametrize("division", [(4, 2), (2, 4)])
def test_accumulation_does_not_change_the_mathematics(
    make_config: Callable[..., RunConfig], condft_trainee: Any, data: Any, division: tuple[int, int]
) -> None:
    size, steps = division
    found = []
    for batch, own, accumulation in ((8, 4, 1), (size, 4 // steps, steps)):
        model = condft_trainee()
        disturb(model)
        config = make_config(per_device_batch_size=batch, gradient_accumulation_steps=accumulation)
        records = run(config, model, data, distillation=distill(model, per_device_batch_size=own))
        found.append([record.get("self_distillation_kl", record["loss"]) for record in records])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_it_holds_the_model_near_the_base(
    make_config: Callable[..., RunConfig], condft_trainee: Any, data: Any
) -> None:
    config = make_config(steps=20)
    apart = []
    for weight in (None, 1.0, 30.0):
        model = condft_trainee()
        options = {"distillation": distill(model, weight=weight, every=1)} if weight else {}
        records = run(config, model, data, **options)
        assert [("self_distillation_kl" in record) for record in records] == [weight is not None] * 20
        apart.append(kl_to_base(model, TEXTS, model.disable_adapter, progress=False))
    assert apart[2] < 0.6 * apart[1]
    assert apart[1] < 0.9 * apart[0]


def test_a_run_distills_where_the_language_model_trains_and_records_the_kl(
    make_config: Callable[..., RunConfig], condft_trainee: Any, data: Any
) -> None:
    config, model = make_config(), condft_trainee()
    prepare_output_dir(config.output_dir)
    train(make_engine(make_accelerator(config, cpu=True)), model, *data, config, distillation=distill(model))
    lines = read_metrics(f"{config.output_dir}/metrics.jsonl")
    assert [(line["stage"], line["step"]) for line in lines if KL in line] == [
        ("adapt", 2),
        ("adapt", 4),
    ]


def test_a_kl_that_is_not_finite_stops_before_the_step(
    make_config: Callable[..., RunConfig], condft_trainee: Any, data: Any
) -> None:
    model = condft_trainee()
    distillation = distill(model, every=1)
    real = distillation.kl_to_base
    distillation.kl_to_base = lambda *arguments: real(*arguments) * float("inf")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="the KL to the base is nan at step 1"):
        run(make_config(), model, data, distillation=distillation)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class DistillingTrainer(Trainer):
    def __init__(self, texts: torch.Tensor, weight: float, **options: Any) -> None:
        super().__init__(**options)
        base = options["model"].disable_adapter
        self.texts, self.weight = texts, weight
        self.distillation = SelfDistillation(SelfDistillationConfig(), texts, base, seed=0)

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, **options)
        rows = torch.randint(len(self.texts), (4,))
        return loss + self.weight * self.distillation.kl_to_base(model, self.model, self.texts[rows])


def test_in_a_trainer_of_transformers(tmp_path: Path) -> None:
    """As the README shows it: the kl is one more term of a loss of one's own."""
    apart = []
    for weight in (0.0, 30.0):
        model = get_peft_model(build_tiny_llama(), CondFTConfig(num_tensors=6))
        with model.disable_adapter():
            own = sample_from_base(
                model, model.generation_config, num_sequences=8, num_tokens=12, seed=0, progress=False
            )
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
        )
        rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
        DistillingTrainer(own, weight, model=model, args=arguments, train_dataset=rows).train()
        apart.append(kl_to_base(model, own, model.disable_adapter, progress=False))
    assert apart[1] < 0.7 * apart[0]
