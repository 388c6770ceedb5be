"""What a stage of training is: which components learn, for how long, at which rates."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from condft.training.config import RunConfig, TrainingConfig

PROJECTOR, LANGUAGE_MODEL = "projector", "language_model"


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: In metrics and checkpoints.
        steps: Optimizer steps.
        learning_rate: Peak rate of each component that learns; a component that is not named rests.
        seed: Of the data order and of dropout.
    """

    name: str
    steps: int
    learning_rate: Mapping[str, float]
    seed: int


def stages_of(config: RunConfig) -> list[Stage]:
    """The run's stages: `projector` (the projector alone) and `adapt` (projector and selected tensors).

    A stage of 0 steps is left out.
    """
    rates = config.training.learning_rate
    both = {PROJECTOR: rates.projector, LANGUAGE_MODEL: rates.language_model}
    # each stage has a seed of its own, so that stage 2 does not depend on whether or how long stage 1 ran
    stages = [
        Stage("projector", config.training.projector_steps, {PROJECTOR: rates.projector}, config.seed),
        Stage("adapt", config.training.steps, both, config.seed + 1),
    ]
    return [stage for stage in stages if stage.steps > 0]


def component_of(name: str) -> str:
    """The component that a parameter belongs to, by its name."""
    return PROJECTOR if "multi_modal_projector" in name else LANGUAGE_MODEL


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter with `requires_grad`, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def only_components_of(stage: Stage, model: nn.Module, *, by_flag: bool = True) -> Iterator[dict[str, nn.Parameter]]:
    """Within, only the stage's components have `requires_grad`; afterwards all flags are as they were.

    Args:
        stage: Its components learn.
        model: The model.
        by_flag: False leaves the flags alone: the others rest because no optimizer has them.

    Yields:
        The parameters that train, by name.

    Raises:
        ValueError: A component of the stage has nothing that may train.
    """
    before = trainable_parameters(model)
    for component in stage.learning_rate:
        if not any(component_of(name) == component for name in before):
            raise ValueError(
                f"stage {stage.name!r} trains the {component}, but none of its parameters has requires_grad "
                f"({len(before)} elsewhere do); select some, or set the stage's steps to 0"
            )
    learning = {name: parameter for name, parameter in before.items() if component_of(name) in stage.learning_rate}
    resting = [parameter for name, parameter in before.items() if by_flag and name not in learning]
    try:
        for parameter in resting:
            parameter.requires_grad_(False)
        yield learning
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def build_optimizer(stage: Stage, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> AdamW:
    """AdamW with one group (and learning rate) a component, each group under its component's `name`."""
    groups = [
        {
            "name": component,
            "params": [parameter for name, parameter in parameters.items() if component_of(name) == component],
            "lr": rate,
        }
        for component, rate in stage.learning_rate.items()
    ]
    return AdamW(groups, weight_decay=weight_decay)


def build_schedule(optimizer: Optimizer, stage: Stage, training: TrainingConfig) -> LambdaLR:
    """Linear warm-up, then the configured decay. Not for `Accelerator.prepare`: there it would step once a *rank*."""
    return LambdaLR(optimizer, lambda step: rate_factor(training.schedule, step, stage.steps, training.warmup_steps))


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate that optimizer step `step` (from 0) takes.

    The warm-up starts at 1/warmup_steps, not at 0, and the decay would reach 0 one step after the last: no step is
    spent on standing still.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return max(0.0, 1 - progress)
        case "constant":
            return 1.0
        case _:
            raise ValueError(f"unknown schedule {schedule!r}; valid: cosine, linear, constant")
