"""Checks before training starts: what is measured at the end must fit the model and the settings."""

import logging
from collections.abc import Sequence
from typing import Any

from condft.retention.measures import held_out_text, text_windows
from condft.tasks.speech import SpeechCollator, SpeechExample
from condft.training.config import EvaluationConfig

__all__ = ["answer_limit", "check_text", "warn_of_cut_answers"]

logger = logging.getLogger(__name__)


def answer_limit(collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig) -> int:
    """Most tokens that a transcription may have.

    This is `evaluation.max_new_tokens`. Where that is null, it is 5/4 of the longest reference, plus 8: a wrong
    hypothesis may need more tokens than its reference, and a model that never ends its answer must be stopped.

    Args:
        collator: Counts the tokens of a reference.
        examples: All that are transcribed, at least one.
        settings: How the run measures.
    """
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    longest = max(collator.count_answer_tokens(example) for example in examples)
    return longest + longest // 4 + 8


def warn_of_cut_answers(
    collator: SpeechCollator, examples: Sequence[SpeechExample], settings: EvaluationConfig
) -> None:
    """Logs a warning where `evaluation.max_new_tokens` is less than a reference has: the rest counts as errors."""
    limit = answer_limit(collator, examples, settings)
    counts = [collator.count_answer_tokens(example) for example in examples]
    longest = max(counts)
    if longest > limit:
        logger.warning(
            "evaluation.max_new_tokens is %d, but the references of %d of %d test clips are longer. Their missing "
            "words will count as errors. The longest one, %s, has %d tokens. Remove the setting, and condft sets the "
            "limit from the references.",
            limit,
            sum(count > limit for count in counts),
            len(counts),
            examples[counts.index(longest)]["source"],
            longest,
        )


def check_text(tokenizer: Any, settings: EvaluationConfig, *, max_length: int | None) -> None:
    """Raises the errors that `measure_text` would raise, before the run has cost any time.

    Args:
        tokenizer: The language model's.
        settings: How the run measures.
        max_length: Longest sequence that the language model takes, in tokens; None if its configuration has no limit.

    Raises:
        FileNotFoundError: `evaluation.text` is neither a known name nor a file.
        ConnectionError: WikiText is not cached and the hub does not answer.
        ValueError: The text is empty, or of fewer than 2 tokens, or the windows are longer than the model takes.
    """
    if max_length is not None and settings.context_length > max_length:
        raise ValueError(
            f"evaluation.context_length is {settings.context_length}, and the language model takes at most "
            f"{max_length} tokens: its cross-entropy on longer windows has no meaning. Set a smaller context_length."
        )
    text = held_out_text(settings.text)
    text_windows(tokenizer, text, max_tokens=settings.text_tokens, context_length=settings.context_length)
