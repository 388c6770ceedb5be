"""How long a transcription may get, and a window of text."""

import logging
from typing import Any

import pytest
import torch

from condft.recipe.checks import answer_limit, check_text, warn_of_cut_answers
from condft.tasks.speech import SpeechCollator, SpeechExample, compose_audio_llm
from condft.training.config import EvaluationConfig
from tests.helpers.models.tiny_speech import save_language_model, save_whisper


@pytest.fixture(scope="module")
def collator(tmp_path_factory: pytest.TempPathFactory) -> SpeechCollator:
    folder = tmp_path_factory.mktemp("parts")
    parts = save_whisper(folder / "whisper"), save_language_model(folder / "llama")
    return SpeechCollator.for_model(*compose_audio_llm(*parts, max_seconds=1))


def examples(*texts: str) -> list[SpeechExample]:
    return [
        {"features": torch.zeros(2, 16), "text": text, "language": "en", "source": f"m.jsonl:{line}"}
        for line, text in enumerate(texts, start=1)
    ]


def test_the_longest_reference_sets_the_limit(collator: SpeechCollator) -> None:
    spoken = examples("one", "x" * 40)  # a token a byte
    assert answer_limit(collator, spoken, EvaluationConfig()) == 40 + 10 + 8
    assert answer_limit(collator, spoken, EvaluationConfig(max_new_tokens=3)) == 3


def test_a_limit_that_cuts_references_off_is_logged(collator: SpeechCollator, caplog: Any) -> None:
    spoken = examples("one", "four two", "three")
    with caplog.at_level(logging.WARNING):
        warn_of_cut_answers(collator, spoken, EvaluationConfig(max_new_tokens=8))
        warn_of_cut_answers(collator, spoken, EvaluationConfig())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_cut_answers(collator, spoken, EvaluationConfig(max_new_tokens=4))
    (record,) = caplog.records
    assert "references of 2 of 3 test clips" in record.getMessage()
    assert "m.jsonl:2, has 8 tokens" in record.getMessage()


def test_windows_of_text_longer_than_the_model_takes_are_refused(collator: SpeechCollator) -> None:
    check_text(collator.processor.tokenizer, EvaluationConfig(context_length=64), max_length=64)
    with pytest.raises(ValueError, match=r"context_length is 65.* at most 64 tokens"):
        check_text(collator.processor.tokenizer, EvaluationConfig(context_length=65), max_length=64)
