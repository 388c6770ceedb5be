"""What a task holds out, and how its inputs and its loss are computed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scripts.research.config import TextSection
from scripts.research.tasks import TextTask, _windows, full_precision, inputs_digest, mean_test_loss
from tests.helpers.models.tiny_llama import build_tiny_llama


def characters(text: str, **_: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) - 32 for character in text]}


def test_the_last_windows_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij" * 10)
    section = TextSection(file=str(tmp_path / "text.txt"), window=9, test_windows=2)
    train, held_out = _windows(characters, section)
    assert (len(train), len(held_out)) == (9, 2)  # eleven whole windows of a hundred tokens
    assert held_out[-1]["features"].tolist() == characters(("abcdefghij" * 10)[90:99])["input_ids"]
    with pytest.raises(ValueError, match="has 11 windows of 9 tokens; 11 are for tests"):
        _windows(characters, section.model_copy(update={"test_windows": 11}))


def test_the_digest_is_of_the_bytes_in_order(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(content)
    a, b, c = (tmp_path / name for name in "abc")
    assert inputs_digest([a, b]) == inputs_digest([c, b]) != inputs_digest([b, a])
    assert len(inputs_digest([a])) == 16


def test_the_test_loss_is_a_mean_over_answer_tokens() -> None:
    model = build_tiny_llama()
    windows = torch.arange(60).reshape(5, 12) % 31
    batches = [TextTask.collate([{"features": row} for row in part]) for part in windows.split(2)]
    task: Any = SimpleNamespace(test=batches)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].flatten(0, 1)
    expected = float(F.cross_entropy(logits, windows[:, 1:].flatten()))
    assert mean_test_loss(model, task) == pytest.approx(expected, rel=1e-5)


def test_a_wrapped_forward_is_put_aside_and_put_back() -> None:
    model: Any = build_tiny_llama()
    wrapped = model.forward = lambda **_: "wrapped"
    with full_precision(model):
        assert "forward" not in model.__dict__
    assert model.forward is wrapped
    with full_precision(plain := build_tiny_llama()):
        assert "forward" not in plain.__dict__
