"""Stages of training: which components train, for how many steps, at which learning rates."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from condft.training.config import RunConfig, TrainingConfig

__all__ = [
    "LANGUAGE_MODEL",
    "PROJECTOR",
    "Stage",
    "build_optimizer",
    "build_schedule",
    "component_of",
    "only_components_of",
    "rate_factor",
    "stages_of",
    "trainable_parameters",
]

PROJECTOR, LANGUAGE_MODEL = "projector", "language_model"


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Name in metrics and checkpoints.
        steps: Number of optimizer steps.
        learning_rate: Peak learning rate of each component that trains. The others keep their values.
        seed: Seed of the data order and of dropout.

    >>> Stage("adapt", steps=130, learning_rate={"projector": 2e-3, "language_model": 1.5e-4}, seed=1).name
    'adapt'
    """

    name: str
    steps: int
    learning_rate: Mapping[str, float]
    seed: int


def stages_of(config: RunConfig) -> list[Stage]:
    """The run's stages: `projector` (the projector alone) and `adapt` (projector and selected weights).

    A stage of 0 steps is left out. The projector trains first, because at the start its output is noise: the language
    model would learn to cope with noise.

    >>> from condft.training import load_config
    >>> [(stage.name, stage.steps) for stage in stages_of(load_config("run.yaml"))]
    [('projector', 1), ('adapt', 2)]
    """
    rates = config.training.learning_rate
    both = {PROJECTOR: rates.projector, LANGUAGE_MODEL: rates.language_model}
    # Each stage has its own seed, so the data order of stage 2 does not depend on the length of stage 1.
    stages = [
        Stage("projector", config.training.projector_steps, {PROJECTOR: rates.projector}, config.seed),
        Stage("adapt", config.training.steps, both, config.seed + 1),
    ]
    return [stage for stage in stages if stage.steps > 0]


def component_of(name: str) -> str:
    """The component that a parameter belongs to, by its name.

    >>> component_of("base_model.model.model.multi_modal_projector.linear_1.weight")
    'projector'
    """
    return PROJECTOR if "multi_modal_projector" in name else LANGUAGE_MODEL


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def only_components_of(stage: Stage, model: nn.Module, *, by_flag: bool = True) -> Iterator[dict[str, nn.Parameter]]:
    """Within it, only the stage's components have `requires_grad`. Afterwards all flags are as before.

    Args:
        stage: The stage.
        model: The model.
        by_flag: False keeps the flags: the other components do not train because no optimizer has them.

    Yields:
        The parameters that train, by name.

    Raises:
        ValueError: A component of the stage has no parameter with `requires_grad`.
    """
    before = trainable_parameters(model)
    for component in stage.learning_rate:
        if not any(component_of(name) == component for name in before):
            raise ValueError(
                f"stage {stage.name!r} trains the {component}, but none of its parameters has requires_grad "
                f"({len(before)} elsewhere do); select some, or set the stage's steps to 0"
            )
    training = {name: parameter for name, parameter in before.items() if component_of(name) in stage.learning_rate}
    frozen = [parameter for name, parameter in before.items() if by_flag and name not in training]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield training
    finally:
        # All of these had it: `before` holds nothing else.
        for parameter in frozen:
            parameter.requires_grad_(True)


def build_optimizer(stage: Stage, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> AdamW:
    """AdamW with one parameter group for each component, which has its learning rate and its `name`."""
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
    """Linear warm-up, then the configured decay.

    Do not pass it to `Accelerator.prepare`, whose scheduler takes one step for each *process* at every optimizer step.
    """
    return LambdaLR(optimizer, lambda step: rate_factor(training.schedule, step, stage.steps, training.warmup_steps))


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0), as a fraction of the peak rate.

    The warm-up starts at 1/warmup_steps, not at 0, and the decay reaches 0 only one step after the last. So every step
    trains something.

    >>> [rate_factor("linear", step, steps=4, warmup_steps=2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    # max: LambdaLR also asks for the step after the last one, and all steps may be warm-up.
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
