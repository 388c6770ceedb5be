"""Analysis and selection: the `tuning` section becomes a `CondFTConfig`, and the composed model a PEFT model."""

import dataclasses
import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from condft.analysis.analyze import analyze
from condft.recipe.measure import measure_fisher
from condft.report import SpectralReport
from condft.training import RunConfig
from condft.training.engines.base import Engine
from condft.tuner import CondFTConfig

__all__ = ["Analysis", "analyze_base", "select_and_wrap", "tuning_config"]

_LANGUAGE_MODEL_WEIGHTS = r"model\.language_model\.layers\..*"
_PROJECTOR = "multi_modal_projector"
# The method fills these in, or the recipe sets them. A YAML cannot.
_NOT_CONFIGURABLE = {"report", "report_fingerprint", "peft_type", "auto_mapping", "peft_version", "inference_mode"}


@dataclass(frozen=True)
class Analysis:
    """What the analysis of the base found.

    Attributes:
        report: The report of the composed model, with Fisher information if the score needs it.
        seconds: Time that the analysis took.
    """

    report: SpectralReport
    seconds: float


def tuning_config(tuning: Mapping[str, Any], *, seed: int) -> CondFTConfig:
    """The `tuning` section as a `CondFTConfig`: the language model's weights are candidates, the projector trains.

    Args:
        tuning: Fields of `CondFTConfig`.
        seed: For `order: random`, unless `tuning` has one.

    Raises:
        ValueError: An unknown field (with the closest valid name), or a value that `CondFTConfig` refuses.
    """
    names = sorted({field.name for field in dataclasses.fields(CondFTConfig)} - _NOT_CONFIGURABLE)
    for key in tuning:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean 'tuning.{close[0]}'?" if close else f"valid: {', '.join(names)}"
            raise ValueError(f"unknown key 'tuning.{key}'; {hint}")
    defaults = {"target_modules": _LANGUAGE_MODEL_WEIGHTS, "modules_to_save": [_PROJECTOR], "seed": seed}
    return CondFTConfig(**{**defaults, **tuning})


def analyze_base(
    model: nn.Module, tokenizer: Any, tuning: CondFTConfig, config: RunConfig, *, progress: bool
) -> Analysis:
    """The spectral report of a composed model. Call it in every process: they share the work.

    Args:
        model: The composed model, the same in every process.
        tokenizer: The language model's.
        tuning: Says whether the selection needs Fisher information, which takes backward passes.
        config: The run.
        progress: Show a progress bar.

    Raises:
        NonFiniteWeightError: Weights hold NaN or infinity.
    """
    began = time.perf_counter()
    report = analyze(model, measures="all", progress=progress)
    if tuning.ranks_by_fisher_information:
        report = measure_fisher(model, tokenizer, report, config.evaluation, seed=config.seed)
    return Analysis(report, time.perf_counter() - began)


def select_and_wrap(model: nn.Module, tuning: CondFTConfig, report: SpectralReport, engine: Engine) -> PeftModel:
    """Selects from the report and wraps the model in place; what may train has `requires_grad` afterwards.

    Args:
        model: The composed model.
        tuning: From `tuning_config`. Its selection is written into it, as `get_peft_model` always does.
        report: A report of the same model.
        engine: Checks that it can train the result.

    Raises:
        ValueError: The budget selects nothing, or the engine cannot train this model.
    """
    # Handed over: get_peft_model would otherwise analyze again, and the run's report would not be the selection's.
    tuning.report = report
    wrapped = get_peft_model(model, tuning)
    engine.check(wrapped)
    return wrapped
