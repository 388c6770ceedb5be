"""The arms: name -> builder of a model that trains what the arm says, all with (nearly) the same number of parameters.

An arm is one way to train in the study: a selection rule of condft, a control, or a peer method such as LoRA.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import LoraConfig, OSFConfig, get_peft_model
from peft.helpers import find_kappa_target_modules
from torch import Tensor, nn

from condft import CondFTConfig, SpectralReport, add_fisher_information
from scripts.research.selections import choose, highest_signal_to_noise, same_shapes_and_depths
from scripts.research.study.fisher import least_cost_at_equal_gain
from scripts.research.study.minor import confine_to_minor_directions

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Context:
    """What an arm is built from.

    Attributes:
        model: The base model (with stage 1's projector, for speech), all parameters frozen; the arm changes it.
        report: Of the weights that may be trained, and of no others.
        fraction: Budget, of their parameters.
        seed: Of random arms.
        modules_to_save: Modules that train in every arm, in addition to the budget (the projector).
        sampled_tokens: Text sampled from the base, `(num_sequences, length)`, for rules that need it; other draws
            than forgetting is measured on.
        losses: For some batches of the task, each computes the base model's mean loss (nats per answer token).
    """

    model: nn.Module
    report: SpectralReport
    fraction: float
    seed: int
    modules_to_save: list[str]
    sampled_tokens: Tensor
    losses: Sequence[Callable[[], Tensor]]

    @property
    def budget(self) -> float:
        return self.fraction * sum(row.num_parameters for row in self.report.rows)


@dataclass(frozen=True)
class Arm:
    """A model ready to train.

    Attributes:
        model: Trainable parameters have `requires_grad`.
        base: Context manager; inside, the model is the base.
        on_step: Called after each optimizer step, in order.
        selected: Names of the weights trained whole; empty for other methods.
    """

    model: Any
    base: Callable[[], AbstractContextManager[Any]]
    on_step: list[OnStep] = field(default_factory=list)
    selected: tuple[str, ...] = ()


def _whole_weights(context: Context, names: tuple[str, ...]) -> Arm:
    config = CondFTConfig(target_units=list(names), modules_to_save=context.modules_to_save or None)
    model = get_peft_model(context.model, config)
    return Arm(model, model.disable_adapter, selected=names)


def _selected(context: Context, **rule: Any) -> Arm:
    return _whole_weights(context, choose(context.report, context.fraction, seed=context.seed, **rule))


def _same_shapes(context: Context) -> Arm:
    reference = choose(context.report, context.fraction, stratify=None)
    return _whole_weights(context, same_shapes_and_depths(context.report, reference, seed=context.seed))


def _signal_to_noise(context: Context) -> Arm:
    return _whole_weights(context, highest_signal_to_noise(context.report, context.fraction))


def _fisher(context: Context, **rule: Any) -> Arm:
    report = add_fisher_information(context.report, context.model, context.sampled_tokens, progress=False)
    return _whole_weights(context, choose(report, context.fraction, score="fisher_information", **rule))


def _fisher_per_gain(context: Context, **rule: Any) -> Arm:
    names = least_cost_at_equal_gain(
        context.model, context.report, context.fraction, context.sampled_tokens, context.losses, **rule
    )
    return _whole_weights(context, names)


def _everything(context: Context) -> Arm:
    return _whole_weights(context, tuple(row.name for row in context.report.rows))


def _lora(context: Context, *, modules: Callable[[Context], list[str]], rank: int | None) -> Arm:
    """LoRA of a rank, or of the rank that spends the budget (None); experts are adapted by their stack's name."""
    names = modules(context)
    shapes = {row.name.removesuffix(".weight"): row.matrix_shape for row in context.report.rows}
    stacks = sorted({name.partition("[")[0] for name in names if "[" in name})
    rank = rank or max(1, round(context.budget / sum(sum(shapes[name]) for name in names)))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="|".join(re.escape(name) for name in names if "[" not in name),
        target_parameters=stacks or None,
        modules_to_save=context.modules_to_save or None,
    )
    model = get_peft_model(context.model, config)
    return Arm(model, model.disable_adapter)


def _all_linear(context: Context) -> list[str]:
    return [row.name.removesuffix(".weight") for row in context.report.rows]


def _kappa_targets(context: Context) -> list[str]:
    """The targets of PEFT's KappaTuneSelector (default: the lowest fifth) among the weights that may be trained."""
    found = find_kappa_target_modules(context.model, show_progress=False, top_p=1.0)["target_modules"] or []
    ours = set(_all_linear(context))
    ranked = [name for name in found if name in ours]  # lowest condition number first
    return ranked[: max(1, round(0.2 * len(ours)))]


def _osf(context: Context) -> Arm:
    """PEFT's OSF on every weight that may be trained, each with as many low directions as the budget pays for."""
    per_direction = sum(sum(row.matrix_shape) + 1 for row in context.report.rows)
    low = max(1, round(context.budget / per_direction))
    names = _all_linear(context)
    preserved: dict[str, int | float] = {
        re.escape(row.name.removesuffix(".weight")): max(1, min(row.matrix_shape) - low) for row in context.report.rows
    }
    config = OSFConfig(target_modules="|".join(map(re.escape, names)), rank_pattern=preserved)
    model = get_peft_model(context.model, config)
    _train_modules(model, context.modules_to_save)  # PEFT 0.21: OSF accepts modules_to_save and ignores it
    return Arm(model, model.disable_adapter)


def _only_modules_to_save(context: Context) -> Arm:
    if not context.modules_to_save:
        raise ValueError("there is no projector to train alone: leave the arm projector_only out of a text study")
    _train_modules(context.model, context.modules_to_save)
    return Arm(context.model, nullcontext)


def _train_modules(model: nn.Module, names: list[str]) -> None:
    for path, parameter in model.named_parameters():
        if any(name in path.split(".") for name in names):
            parameter.requires_grad_(True)


def _minor(context: Context, *, arm: Callable[[Context], Arm]) -> Arm:
    built = arm(context)
    return replace(built, on_step=[*built.on_step, confine_to_minor_directions(built.model)])


_lowest: Callable[[Context], Arm] = _selected
_random_within_type = partial(_selected, order="random")
_fisher_within_type: Callable[[Context], Arm] = _fisher
_fisher_across_types = partial(_fisher, stratify=None)
_lowest_minor = partial(_minor, arm=_lowest)
_lora_all_linear = partial(_lora, modules=_all_linear, rank=16)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

ARMS: dict[str, Callable[[Context], Arm]] = {
    "lowest_within_type": _lowest,
    "highest_within_type": partial(_selected, order="highest"),
    "random_within_type": _random_within_type,
    "lowest_across_types": partial(_selected, stratify=None),
    "highest_across_types": partial(_selected, stratify=None, order="highest"),
    "random_across_types": partial(_selected, stratify=None, order="random"),
    "random_same_shapes": _same_shapes,
    # across types only: within a type all shapes are the same, and it ranks as κ does
    "relative_kappa_across_types": partial(_selected, score="relative_condition_number", stratify=None),
    "entropy_deficit_within_type": partial(_selected, score="entropy_deficit"),
    "stable_rank_within_type": partial(_selected, score="stable_rank"),
    "spectrum_snr": _signal_to_noise,
    "fisher_within_type": _fisher_within_type,
    "fisher_across_types": _fisher_across_types,
    "fisher_per_gain_within_type": _fisher_per_gain,
    "fisher_per_gain_across_types": partial(_fisher_per_gain, stratify=None),
    "query_key_only": partial(_selected, kinds=("q_proj", "k_proj")),
    "attention_only": partial(_selected, kinds=_ATTENTION),
    "gate_up_only": partial(_selected, kinds=("gate_proj", "up_proj")),
    "lora_all_linear": _lora_all_linear,
    "lora_equal_budget": partial(_lora, modules=_all_linear, rank=None),
    "lora_kappa_targets": partial(_lora, modules=_kappa_targets, rank=16),
    "osf": _osf,
    "full_fine_tuning": _everything,
    "projector_only": _only_modules_to_save,
    # the study trains arms of such names with self-distillation
    "lowest_within_type_distilled": _lowest,
    "fisher_within_type_distilled": _fisher_within_type,
    "fisher_across_types_distilled": _fisher_across_types,
    "random_within_type_distilled": _random_within_type,
    "full_fine_tuning_distilled": _everything,
    "lora_all_linear_distilled": _lora_all_linear,
    "lowest_within_type_minor": _lowest_minor,
    "lowest_within_type_minor_distilled": _lowest_minor,
}


def build_arm(name: str, context: Context) -> Arm:
    """Builds an arm of the registry.

    Raises:
        ValueError: No such arm, or one that does not fit the task.
    """
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}; there are {', '.join(ARMS)}")
    return ARMS[name](context)
