"""Checkpoints from raw files, with tiny models: what is written, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, WhisperForConditionalGeneration

from scripts.data import checkpoints
from tests.helpers.models.tiny_speech import save_language_model, save_whisper


def test_a_language_model_is_saved_again_in_fp32(tmp_path: Path) -> None:
    raw = Path(save_language_model(tmp_path / "raw"))
    LlamaForCausalLM.from_pretrained(raw, dtype=torch.bfloat16).save_pretrained(raw)
    checkpoints.resave_smollm2(raw, tmp_path / "target")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert found.dtype == torch.float32
    before = LlamaForCausalLM.from_pretrained(raw, dtype=torch.float32).state_dict()
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in before.items())


def test_a_language_model_that_knows_no_paris_is_refused(tmp_path: Path) -> None:
    folder = Path(save_language_model(tmp_path / "llama"))
    with pytest.raises(ValueError, match="continues with"):
        checkpoints.verify_smollm2(folder, None)
    untied = Path(save_language_model(tmp_path / "untied", tied=False))
    with pytest.raises(ValueError, match="not tied"):
        checkpoints.verify_smollm2(untied, None)


def test_half_precision_is_refused(tmp_path: Path) -> None:
    folder = Path(save_language_model(tmp_path / "llama"))
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    with pytest.raises(ValueError, match="bfloat16"):
        checkpoints.verify_smollm2(folder, None)
    whisper = Path(save_whisper(tmp_path / "whisper"))
    WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float16).save_pretrained(whisper)
    with pytest.raises(ValueError, match="float16"):
        checkpoints.verify_whisper(whisper, None)


@pytest.mark.parametrize(("transcription", "is_right"), [(" 3-1-4-7-2", True), (" 3 1 4", False)])
def test_a_transcription_must_have_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transcription: str, is_right: bool
) -> None:
    folder = Path(save_whisper(tmp_path / "whisper"))
    monkeypatch.setattr(checkpoints, "_transcribe", lambda *_: transcription)
    monkeypatch.setattr(checkpoints.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    if is_right:
        assert checkpoints.verify_whisper(folder, None)["transcription"] == transcription
    else:
        with pytest.raises(ValueError, match="transcribed ' 3 1 4'"):
            checkpoints.verify_whisper(folder, None)


def test_the_test_signal_repeats_and_fills_ten_seconds() -> None:
    signal = checkpoints._test_signal()
    assert signal.shape == (160_000,)
    assert np.array_equal(signal, checkpoints._test_signal())
