"""Measures the atlas and the stability of κ: a line for each weight, and one for each small change of a model."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from condft import SpectralReport, SpectralRow, analyze
from condft.recipe.provenance import code_commit, machine, versions
from condft.report import Role
from condft.selection.random_matrix import (
    expected_condition_number,
    expected_entropy_deficit,
    relative_condition_number,
)
from condft.training import RunConfig, Stage, TrainingConfig, make_accelerator, make_engine, read_metrics, train_stage
from condft.training.stage import LANGUAGE_MODEL
from condft.weights.walk import Unit, iter_units
from scripts.research.config import StudyConfig
from scripts.research.information import entropy_deficit_bounds
from scripts.research.kappa.variants import variants
from scripts.research.selections import layer_of
from scripts.research.store import append_line
from scripts.research.tasks import TextTask, inputs_digest, mean_test_loss, precision

FINE_TUNING = "fine-tuning"
_LAST_LOSSES = 8  # a train loss is the mean of so many steps


def measure_atlas(folders: Sequence[Path], results: Path) -> int:
    """Appends a line for every weight of the models that the file does not have yet; returns how many."""
    count = 0
    for folder in folders:
        inputs = inputs_digest([folder / "model.safetensors"])
        if any(line["inputs"] == inputs for line in read_metrics(results)):
            continue
        report = analyze(folder, measures="all", cache=False, progress=False)
        facts = {"inputs": inputs, "commit": code_commit()}
        for row in report.rows:
            append_line(results, {"model": folder.name, **atlas_row(row), **facts})
        count += len(report.rows)
    return count


def atlas_row(row: SpectralRow) -> dict[str, Any]:
    """A weight's line: κ and the rest from the spectrum, and what κ and the shape alone say of it.

    Deficit and log-volume are nats per dimension; `deficit_at_least` and `deficit_at_most` are
    `entropy_deficit_bounds` of κ. Infinite figures (a rank-deficient weight) are null.
    """
    dimension = min(row.matrix_shape)
    low, high = entropy_deficit_bounds(row.condition_number, dimension, per_dimension=True)
    assert row.entropy_deficit is not None  # measures="all"
    assert row.log_volume is not None
    found = {
        "condition_number": row.condition_number,
        "relative_condition_number": relative_condition_number(row.condition_number, *row.matrix_shape),
        "random_condition_number": expected_condition_number(*row.matrix_shape),
        "entropy_deficit": row.entropy_deficit / dimension,
        "random_entropy_deficit": expected_entropy_deficit(*row.matrix_shape),
        "deficit_at_least": low,
        "deficit_at_most": high,
        "stable_rank": row.stable_rank,
        "log_volume": row.log_volume / dimension,
        "relative_error": row.relative_error,
    }
    return {
        "name": row.name,
        "type": row.module_type,
        "role": row.role.value,
        "depth": layer_of(row.name),
        "shape": list(row.matrix_shape),
        **{key: finite(value, 8) for key, value in found.items()},
    }


class Stability:
    """The layer weights of one checkpoint, changed a little and measured again, one line a change."""

    def __init__(self, folder: Path, results: Path) -> None:
        self.folder, self.results = folder, results
        self.inputs = inputs_digest([folder / "model.safetensors"])
        self.model = load_model(folder)
        units = (unit for unit in iter_units(self.model) if isinstance(unit, Unit) and unit.role is Role.LAYER)
        self.base = {unit.name: unit.tensor.detach().clone() for unit in units}

    def has(self, name: str, amount: float) -> bool:
        """Whether the file has that change of this model, of these bytes."""
        keys = ((line["inputs"], line["variant"], line["amount"]) for line in read_metrics(self.results))
        return (self.inputs, name, amount) in keys

    def measure_variants(self) -> None:
        """Every change that the file does not have; the model is as before afterwards."""
        for variant in variants():
            if self.has(variant.name, variant.amount):
                continue
            for name, weight in self.base.items():
                self.model.get_parameter(name).data = variant.change(name, weight)
            self.append(self.model, variant.name, variant.amount, {})
        for name, weight in self.base.items():
            self.model.get_parameter(name).data = weight.clone()

    def append(self, model: nn.Module, name: str, amount: float, facts: Mapping[str, Any]) -> None:
        """Measures the model, which is this one changed, and appends the line."""
        began = time.process_time()
        report = analyze(model, names=self.base.keys(), measures="all", cache=False, progress=False)
        line = {
            "model": self.folder.name,
            "variant": name,
            "amount": amount,
            **facts,
            "unresolved": sum(not row.resolved for row in report.rows),
            "weights": scores_of(report, model, self.base),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        about = {"inputs": self.inputs, "commit": code_commit(), "machine": machine(), "versions": versions()}
        append_line(self.results, {**line, **about})


def scores_of(report: SpectralReport, model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Name -> κ, entropy deficit per dimension, stable rank, and ‖ΔW‖/‖W‖ against the base."""
    found = {}
    for row in report.rows:
        assert row.entropy_deficit is not None  # measures="all"
        weight = base[row.name]
        moved = float((model.get_parameter(row.name).detach().float() - weight).norm() / weight.norm())
        deficit = row.entropy_deficit / min(row.matrix_shape)
        figures = (row.condition_number, 7), (deficit, 7), (row.stable_rank, 7), (moved, 3)
        found[row.name] = [finite(value, digits) for value, digits in figures]
    return found


def fine_tune(stability: Stability, config: StudyConfig, rates: Collection[float], *, seed: int = 0) -> None:
    """Full fine-tuning of the layer weights on the study's text at each rate, and the end of each run measured."""
    task = TextTask(config)
    accelerator = make_accelerator(RunConfig.model_construct(output_dir=config.workspace, training=config.training))
    for rate in rates:
        if not stability.has(FINE_TUNING, rate):
            with task.fresh(seed, accelerator) as model:
                for name in stability.base:
                    model.get_parameter(name).requires_grad_(True)
                facts = _train(accelerator, model, task, config.training, rate, seed)
                stability.append(model, FINE_TUNING, rate, facts)


def _train(
    accelerator: Accelerator, model: nn.Module, task: TextTask, training: TrainingConfig, rate: float, seed: int
) -> dict[str, Any]:
    """Trains what has `requires_grad`, as the study does; returns its facts for the line."""
    torch.manual_seed(seed)
    losses: list[float] = []
    with precision(accelerator):
        before = mean_test_loss(model, task)
    stage = Stage("adapt", training.steps, {LANGUAGE_MODEL: rate}, seed + 1)
    began = time.perf_counter()
    train_stage(
        make_engine(accelerator),
        model,
        task.train,
        task.collate,
        stage,
        training,
        on_step=lambda record: losses.append(record["loss"]),
    )
    seconds = time.perf_counter() - began
    with precision(accelerator):
        after = mean_test_loss(model, task)
    return {
        "steps": training.steps,
        "seed": seed,
        "test_loss_before": before,
        "test_loss": after,
        "train_loss": sum(losses[-_LAST_LOSSES:]) / len(losses[-_LAST_LOSSES:]),
        "seconds_training": round(seconds, 1),
    }


def load_model(folder: Path) -> nn.Module:
    """The checkpoint in fp32, as the class that its config names: weights are then called as `analyze` calls them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model: nn.Module = model_class.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def finite(value: float, digits: int) -> float | None:
    """Rounded to significant digits; None for an infinity, which JSON does not have."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
