"""Figures of an evaluation point that need no run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.research.study.cloze import CLOZE
from scripts.research.study.measure import cloze_log_probability, measure_end
from tests.helpers.models.tiny_llama import build_tiny_llama


class Characters:
    """A token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - 32 for character in text]}


def test_cloze_is_the_sum_over_the_completions_tokens() -> None:
    model, tokenizer = build_tiny_llama(), Characters()
    total = 0.0
    for context, completion in CLOZE:
        start, end = tokenizer(context)["input_ids"], tokenizer(completion)["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([start + end])).logits[0].log_softmax(-1)
        total += sum(float(logs[len(start) - 1 + index, token]) for index, token in enumerate(end))
    assert cloze_log_probability(model, tokenizer) == pytest.approx(total / len(CLOZE), rel=1e-4)
    assert math.isfinite(total)


def test_the_long_text_is_read_on_its_seeds_alone() -> None:
    config: Any = SimpleNamespace(final_seeds=[4])
    nothing: Any = None
    assert measure_end(nothing, nothing, config, nothing, seed=0) == {}
