"""Measures an audio LLM: what it hears (WER) beside what it still knows (text cross-entropy, KL to the base)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condft.report import SpectralReport
from condft.retention.measures import CrossEntropy, held_out_text, kl_to_base, text_cross_entropy, text_windows
from condft.retention.sampling import sample_from_base
from condft.retention.self_distillation import SelfDistillation
from condft.tasks.speech import SpeechCollator, SpeechExample
from condft.tasks.speech.wer import WerReport, transcribe, word_error_rate
from condft.training import RunConfig
from condft.training.config import EvaluationConfig
from condft.tuner import add_fisher_information

__all__ = [
    "Hearing",
    "answer_limit",
    "check_text",
    "kl_on_sampled_text",
    "make_self_distillation",
    "measure_fisher",
    "measure_hearing",
    "measure_text",
    "warn_of_cut_answers",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hearing:
    """Word error rates, and the transcriptions behind them."""

    report: WerReport
    references: list[str]
    hypotheses: list[str]


def measure_hearing(
    model: Any, collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig
) -> Hearing:
    """WER by language. Call it where the model takes precomputed features."""
    size = settings.per_device_batch_size
    # Sorted by length, so that a batch holds little padding; put back in order afterwards.
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index]["features"]), index))
    batches = [
        collator.prompts([examples[i] for i in order[start : start + size]]) for start in range(0, len(order), size)
    ]
    limit = answer_limit(collator, examples, settings)
    heard = transcribe(model, collator.processor.tokenizer, batches, max_new_tokens=limit)
    by_index = dict(zip(order, heard, strict=True))
    hypotheses = [by_index[index] for index in range(len(examples))]
    references = [example["text"] for example in examples]
    languages = [example["language"] for example in examples]
    return Hearing(word_error_rate(references, hypotheses, languages), references, hypotheses)


def answer_limit(collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig) -> int:
    """How many tokens a transcription may have.

    `evaluation.max_new_tokens`; where that is null, a quarter more than the longest reference has, and 8: what is
    heard wrongly may take more tokens than what was said, and a model that cannot stop must be stopped.
    """
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    longest = max(collator.count_answer_tokens(example) for example in examples)
    return longest + longest // 4 + 8


def warn_of_cut_answers(
    collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig
) -> None:
    """Logs a warning where `evaluation.max_new_tokens` is too few for what was said: the WER would count the rest."""
    limit = answer_limit(collator, examples, settings)
    counts = [collator.count_answer_tokens(example) for example in examples]
    longest = max(counts)
    if longest > limit:
        logger.warning(
            "evaluation.max_new_tokens is %d: %d of %d test clips say more, and their missing words will count as "
            "errors; the longest text, %s, has %d tokens. Leave it out, and the texts decide.",
            limit,
            sum(count > limit for count in counts),
            len(counts),
            examples[counts.index(longest)]["source"],
            longest,
        )


def measure_text(model: Any, tokenizer: Any, settings: EvaluationConfig) -> CrossEntropy:
    """Cross entropy on held-out text."""
    return text_cross_entropy(
        model,
        tokenizer,
        held_out_text(settings.text),
        max_tokens=settings.text_tokens,
        context_length=settings.context_length,
    )


def check_text(tokenizer: Any, settings: EvaluationConfig, *, max_length: int | None) -> None:
    """Tells before a run begins what `measure_text` would tell in it.

    Args:
        tokenizer: The language model's.
        settings: Of the run.
        max_length: Tokens that the language model takes, if its configuration tells.

    Raises:
        FileNotFoundError: `evaluation.text` is neither a known name nor a file.
        ConnectionError: WikiText is not cached and the hub does not answer.
        ValueError: The text is empty, or of fewer than 2 tokens, or the windows are longer than the model takes.
    """
    if max_length is not None and settings.context_length > max_length:
        raise ValueError(
            f"evaluation.context_length is {settings.context_length}, and the language model takes at most "
            f"{max_length} tokens: past them its cross-entropy says nothing"
        )
    text = held_out_text(settings.text)
    text_windows(tokenizer, text, max_tokens=settings.text_tokens, context_length=settings.context_length)


def measure_fisher(
    model: Any, tokenizer: Any, report: SpectralReport, settings: EvaluationConfig, *, seed: int
) -> SpectralReport:
    """The report with the Fisher information of what can train, on other text of the base's than KL is measured on.

    Args:
        model: The base, on every rank the same.
        tokenizer: Its tokenizer.
        report: Of the base.
        settings: How much text.
        seed: Of the run.
    """
    return add_fisher_information(report, model, _own_text(model, tokenizer, settings, seed + 1))


def make_self_distillation(model: Any, tokenizer: Any, config: RunConfig) -> SelfDistillation | None:
    """What the run rehearses, if anything: text that the base writes now, other than KL is measured on.

    Args:
        model: A PEFT model; the base is the same model under `disable_adapter`.
        tokenizer: Its tokenizer.
        config: Of the run.
    """
    settings = config.training.self_distillation
    if settings is None or not config.training.steps:
        return None
    tokens = sample_from_base(
        model,
        tokenizer,
        num_sequences=settings.num_sequences,
        num_tokens=settings.num_tokens,
        seed=config.seed + 2,  # + 1 is measure_fisher's
        base_context=model.disable_adapter,
    )
    return SelfDistillation(settings, tokens, model.disable_adapter, seed=config.seed)


def kl_on_sampled_text(model: Any, tokenizer: Any, settings: EvaluationConfig, *, seed: int) -> float:
    """KL(base ‖ adapted) in nats per token, on text that the base model itself generates.

    Args:
        model: A PEFT model; the base is the same model under `disable_adapter`.
        tokenizer: Its tokenizer.
        settings: How much text.
        seed: Of the sampling.
    """
    with model.disable_adapter():
        tokens = _own_text(model, tokenizer, settings, seed)
    return kl_to_base(model, tokens, model.disable_adapter)


def _own_text(base: Any, tokenizer: Any, settings: EvaluationConfig, seed: int) -> Tensor:
    return sample_from_base(
        base,
        tokenizer,
        num_sequences=settings.sampled_sequences,
        num_tokens=settings.sampled_tokens,
        seed=seed,
    )
