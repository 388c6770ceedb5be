"""Measures an audio LLM: what it learned (word error rate) and what it forgot (text cross-entropy, KL to the base)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condft.recipe.checks import answer_limit
from condft.recipe.data import RunData
from condft.report import SpectralReport
from condft.retention.measures import CrossEntropy, held_out_text, kl_to_base, text_cross_entropy
from condft.retention.sampling import sample_from_base
from condft.retention.self_distillation import SelfDistillation
from condft.tasks.speech import SpeechCollator, SpeechExample, precomputed_features
from condft.tasks.speech.wer import WerReport, transcribe, word_error_rate
from condft.training import RunConfig
from condft.training.config import EvaluationConfig
from condft.tuner import add_fisher_information

__all__ = [
    "Measurement",
    "Transcription",
    "kl_on_sampled_text",
    "make_self_distillation",
    "measure_fisher",
    "measure_model",
    "measure_text",
    "measure_transcription",
]

# Each kind of sampled text has a seed of its own, counted from the run's. KL is then measured on text that neither
# chose the weights (Fisher information) nor trained them (self-distillation).
_FISHER_SEED, _DISTILLATION_SEED = 1, 2


@dataclass(frozen=True)
class Transcription:
    """Word error rates, and the texts that they were computed from.

    Attributes:
        report: Word error rates.
        references: The correct texts, one for each clip.
        hypotheses: What the model wrote, in the same order.
    """

    report: WerReport
    references: list[str]
    hypotheses: list[str]


@dataclass(frozen=True)
class Measurement:
    """What one state of the model has learned and what it has kept.

    Attributes:
        transcription: Transcriptions of the test split.
        text: Cross-entropy on held-out text.
    """

    transcription: Transcription
    text: CrossEntropy


def measure_model(model: Any, data: RunData, settings: EvaluationConfig) -> Measurement:
    """Transcribes the test split and reads the held-out text. Call it in every process: they share the clips."""
    with precomputed_features(model):
        transcription = measure_transcription(model, data.collator, data.test, settings)
        return Measurement(transcription, measure_text(model, data.tokenizer, settings))


def measure_transcription(
    model: Any, collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig
) -> Transcription:
    """Word error rates by language. Call it within `precomputed_features(model)`.

    Args:
        model: An audio LLM, also wrapped by PEFT.
        collator: Makes the prompts.
        examples: At least one.
        settings: Batch size and the longest answer.
    """
    size = settings.per_device_batch_size
    # Sorted by length, so that a batch holds little padding. Ties by index: the batches, and with them the rounding of
    # their products, are the same in every run.
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index]["features"]), index))
    batches = [
        collator.prompts([examples[i] for i in order[start : start + size]]) for start in range(0, len(order), size)
    ]
    limit = answer_limit(collator, examples, settings)
    texts = transcribe(model, collator.processor.tokenizer, batches, max_new_tokens=limit)
    by_index = dict(zip(order, texts, strict=True))
    hypotheses = [by_index[index] for index in range(len(examples))]
    references = [example["text"] for example in examples]
    languages = [example["language"] for example in examples]
    return Transcription(word_error_rate(references, hypotheses, languages), references, hypotheses)


def measure_text(model: Any, tokenizer: Any, settings: EvaluationConfig) -> CrossEntropy:
    """Cross-entropy on held-out text, in nats per token."""
    return text_cross_entropy(
        model,
        tokenizer,
        held_out_text(settings.text),
        max_tokens=settings.text_tokens,
        context_length=settings.context_length,
    )


def measure_fisher(
    model: Any, tokenizer: Any, report: SpectralReport, settings: EvaluationConfig, *, seed: int
) -> SpectralReport:
    """The report with the Fisher information of what can train, on text sampled from the base.

    Args:
        model: The base, the same in every process.
        tokenizer: Its tokenizer.
        report: The spectral report of the base.
        settings: How much text.
        seed: The run's seed.
    """
    return add_fisher_information(report, model, _sampled_text(model, tokenizer, settings, seed + _FISHER_SEED))


def make_self_distillation(model: Any, tokenizer: Any, config: RunConfig) -> SelfDistillation | None:
    """The self-distillation of a run, with its text sampled from the base; None if the run has none.

    Args:
        model: A PEFT model; the base is the same model under `disable_adapter`.
        tokenizer: Its tokenizer.
        config: The run.
    """
    settings = config.training.self_distillation
    # Without steps of stage 2 only the projector trains, which text does not pass: the KL would be 0.
    if settings is None or not config.training.steps:
        return None
    tokens = sample_from_base(
        model,
        tokenizer,
        num_sequences=settings.num_sequences,
        num_tokens=settings.num_tokens,
        seed=config.seed + _DISTILLATION_SEED,
        base_context=model.disable_adapter,
    )
    return SelfDistillation(settings, tokens, model.disable_adapter, seed=config.seed)


def kl_on_sampled_text(model: Any, tokenizer: Any, settings: EvaluationConfig, *, seed: int) -> float:
    """KL(base ‖ adapted) in nats per token, on text sampled from the base.

    Args:
        model: A PEFT model; the base is the same model under `disable_adapter`.
        tokenizer: Its tokenizer.
        settings: How much text.
        seed: Seed of the sampling.
    """
    with model.disable_adapter():
        tokens = _sampled_text(model, tokenizer, settings, seed)
    return kl_to_base(model, tokens, model.disable_adapter)


def _sampled_text(base: Any, tokenizer: Any, settings: EvaluationConfig, seed: int) -> Tensor:
    return sample_from_base(
        base,
        tokenizer,
        num_sequences=settings.sampled_sequences,
        num_tokens=settings.sampled_tokens,
        seed=seed,
    )
