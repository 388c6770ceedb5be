"""Cached tower features: the same numbers as the tower's, computed once, and no trace of the swap afterwards."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

from condft.tasks.speech import (
    Clip,
    SpeechCollator,
    SpeechDataError,
    components,
    compose_audio_llm,
    compute_features,
    make_examples,
    precomputed_features,
    read_audio,
)
from condft.tasks.speech.features import PassThroughTower, default_cache_dir, tower_fingerprint
from tests.helpers.processes import WORKERS

SpeechLLM = tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]


def mel_prompts(processor: AudioFlamingo3Processor, clips: list[Clip]) -> dict[str, torch.Tensor]:
    """What a user of plain transformers would feed the model."""
    content = [{"type": "audio"}, {"type": "text", "text": "Transcribe the speech."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text] * len(clips), audio=[read_audio(clip) for clip in clips])


def tower_calls(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """Counts the clips that go through the real tower's forward, which still runs."""
    seen: list[int] = []
    forward = model.model.audio_tower.forward

    def counting(input_features: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(input_features))
        return forward(input_features, *args, **kwargs)

    monkeypatch.setattr(model.model.audio_tower, "forward", counting)
    return seen


def test_cached_features_give_the_logits_and_text_of_the_real_tower(
    speech_llm: SpeechLLM, clips: list[Clip], tmp_path: Path
) -> None:
    model, processor = speech_llm
    mel = mel_prompts(processor, clips)
    collator = SpeechCollator.for_model(model, processor)
    cached = collator.prompts(make_examples(clips, compute_features(model, processor, clips, cache_dir=tmp_path)))
    assert torch.equal(cached["input_ids"], mel["input_ids"])
    assert torch.equal(cached["attention_mask"], mel["attention_mask"])
    with torch.no_grad():
        expected = model(**mel).logits
        generated = model.generate(**mel, max_new_tokens=4)
        with precomputed_features(model):
            actual = model(**cached).logits
            regenerated = model.generate(**cached, max_new_tokens=4)
        audible = model(**{**mel, "input_features": mel["input_features"].roll(1, 0)}).logits
    # Two full-window batches of equal size; only rows of padding differ between the two ways.
    torch.testing.assert_close(actual[mel["attention_mask"] == 1], expected[mel["attention_mask"] == 1])
    assert torch.equal(regenerated, generated)
    assert not torch.allclose(audible[:, -1], expected[:, -1], atol=1e-5)  # the logits do hear the audio


def test_each_recording_goes_through_the_tower_once(
    speech_llm: SpeechLLM, clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = speech_llm
    calls = tower_calls(monkeypatch, model)
    doubled = [*clips, Clip(Path(clips[0].audio).read_bytes(), "other words", clips[0].seconds, "bytes")]
    first = compute_features(model, processor, doubled, cache_dir=tmp_path, batch_size=3)
    assert calls == [3, 1]
    again = compute_features(model, processor, doubled[::-1], cache_dir=tmp_path)
    assert calls == [3, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, again[::-1], strict=True))
    assert torch.equal(first[0], first[-1])
    for clip, tensor in zip(doubled, first, strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.shape == (int(clip.seconds * 25 + 1e-6), model.config.audio_config.hidden_size)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(clips)
    assert all(file.parent.name == file.name[:2] for file in files)


def test_damaged_and_foreign_files_are_computed_again(
    speech_llm: SpeechLLM, clips: list[Clip], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = speech_llm
    first = compute_features(model, processor, clips, cache_dir=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-7])
    files[1].write_bytes(b"")
    save_file({"features": torch.zeros(3, 5)}, files[2])
    with caplog.at_level(logging.WARNING, logger="condft.tasks.speech.features"):
        again = compute_features(model, processor, clips, cache_dir=tmp_path)
    assert sum("computing it again" in record.getMessage() for record in caplog.records) == 3
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)


def test_the_fingerprint_follows_what_features_depend_on(
    checkpoints: tuple[str, str], speech_llm: SpeechLLM, tmp_path: Path
) -> None:
    model, processor = speech_llm
    tower, extractor = model.model.audio_tower, processor.feature_extractor
    known = tower_fingerprint(tower, extractor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AudioFlamingo3ForConditionalGeneration.from_pretrained(tmp_path)
    extractor_again = AudioFlamingo3Processor.from_pretrained(tmp_path).feature_extractor
    assert tower_fingerprint(loaded.model.audio_tower, extractor_again) == known
    other_seed, _ = compose_audio_llm(*checkpoints, max_seconds=2, seed=7)
    assert tower_fingerprint(other_seed.model.audio_tower, extractor) == known  # the projector is no part of it
    with torch.no_grad():
        loaded.model.audio_tower.layers[1].fc2.bias[0] += 1e-3
    changed = tower_fingerprint(loaded.model.audio_tower, extractor)
    longer, longer_processor = compose_audio_llm(*checkpoints, max_seconds=3)
    wider = tower_fingerprint(longer.model.audio_tower, longer_processor.feature_extractor)
    extractor_again.dither = 0.1
    dithered = tower_fingerprint(tower, extractor_again)
    assert len({known, changed, wider, dithered}) == 4


def test_the_swap_leaves_no_trace_even_after_an_error(speech_llm: SpeechLLM) -> None:
    model, processor = speech_llm
    tower = model.model.audio_tower
    names = list(model.state_dict())
    with precomputed_features(model) as swapped:
        assert swapped is model
        assert isinstance(components(model)["audio_tower"], PassThroughTower)
        assert not any("audio_tower" in name for name in model.state_dict())
        with pytest.raises(ValueError, match="outside of precomputed_features"):
            compute_features(model, processor, [])
    assert model.model.audio_tower is tower
    with pytest.raises(KeyError, match="inside"), precomputed_features(model):
        raise KeyError("inside")
    assert model.model.audio_tower is tower
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="Linear holds no audio_tower"), precomputed_features(torch.nn.Linear(1, 1)):
        pass


def test_the_swap_reaches_through_peft(checkpoints: tuple[str, str], clips: list[Clip], tmp_path: Path) -> None:
    model, processor = compose_audio_llm(*checkpoints, max_seconds=2)
    examples = make_examples(clips, compute_features(model, processor, clips, cache_dir=tmp_path))
    batch = SpeechCollator.for_model(model, processor)(examples)
    with torch.no_grad(), precomputed_features(model):
        expected = model(**batch).loss
    config = LoraConfig(target_modules=r".*language_model.*v_proj", modules_to_save=["multi_modal_projector"])
    wrapped = get_peft_model(model, config)
    with precomputed_features(wrapped):
        loss = wrapped(**batch).loss
        loss.backward()
    assert torch.equal(loss.detach(), expected)  # LoRA starts as the identity
    gradients = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
    assert any("multi_modal_projector" in name for name in gradients)
    assert not isinstance(components(wrapped)["audio_tower"], PassThroughTower)


def test_a_bf16_model_takes_fp32_features(checkpoints: tuple[str, str], clips: list[Clip], tmp_path: Path) -> None:
    model, processor = compose_audio_llm(*checkpoints, max_seconds=2, dtype=torch.bfloat16)
    features = compute_features(model, processor, clips, cache_dir=tmp_path)
    assert {tensor.dtype for tensor in features} == {torch.float32}
    batch = SpeechCollator.for_model(model, processor)(make_examples(clips, features))
    with torch.no_grad(), precomputed_features(model):
        assert torch.isfinite(model(**batch).loss)


def test_clips_out_of_range_are_named(speech_llm: SpeechLLM, make_clip: Callable[..., Path], tmp_path: Path) -> None:
    model, processor = speech_llm
    long = Clip(make_clip(tmp_path / "long.wav", 2.5), "one", 2.5, "m.jsonl:7")
    with pytest.raises(SpeechDataError, match=r"m\.jsonl:7: the clip lasts 2\.50 s, the model's window is 2 s"):
        compute_features(model, processor, [long], cache_dir=tmp_path)
    short = Clip(make_clip(tmp_path / "short.wav", 0.02), "one", 0.02, "m.jsonl:8")
    with pytest.raises(SpeechDataError, match=r"m\.jsonl:8: the clip lasts 0\.020 s, too short"):
        compute_features(model, processor, [short], cache_dir=tmp_path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.integers(min_value=800, max_value=32000))
def test_features_and_placeholders_of_the_processor_agree_at_every_length(
    speech_llm: SpeechLLM, tmp_path: Path, samples: int
) -> None:
    model, processor = speech_llm
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(samples) / 9).astype(np.float32), 16000, format="WAV")
    clip = Clip(file.getvalue(), "one", samples / 16000, "here")
    (features,) = compute_features(model, processor, [clip], cache_dir=tmp_path, progress=False)
    ids = mel_prompts(processor, [clip])["input_ids"]
    assert (ids == processor.audio_token_id).sum() == len(features)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("CONDFT_CACHE", raising=False)
    assert default_cache_dir() == Path("/x/condft/features")
    monkeypatch.setenv("CONDFT_CACHE", "off")  # of reports; not a folder of that name
    assert default_cache_dir() == Path("/x/condft/features")
    monkeypatch.setenv("CONDFT_CACHE", "/own")
    assert default_cache_dir() == Path("/own/features")
    monkeypatch.delenv("CONDFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/home/me/.cache/condft/features")


@pytest.mark.multiprocess
def test_ranks_share_the_work_and_agree(checkpoints: tuple[str, str], manifest: Path, tmp_path: Path) -> None:
    script = WORKERS / "features.py"
    arguments = [str(tmp_path), *checkpoints, str(manifest)]
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), *arguments]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("shared", "separate"):
        pairs = zip(first[name]["features"], second[name]["features"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    # A cache folder that both see halves the work; on separate disks every rank has to do all of it.
    assert (first["shared"]["calls"], second["shared"]["calls"]) == (2, 2)
    assert (first["separate"]["calls"], second["separate"]["calls"]) == (4, 4)
