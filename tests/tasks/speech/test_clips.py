"""Clips: decoded to one format, refused where the recording is not what its header says, and hashed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from condft.tasks.speech import Clip, SkippedClip, SpeechDataError, load_manifest, read_audio
from condft.tasks.speech.clips import clips_digest, describe_skipped, longest_seconds
from tests.helpers.models.tiny_speech import write_lines

MakeClip = Callable[..., Path]


def test_the_longest_clip_and_a_line_on_skipped_ones() -> None:
    assert longest_seconds([Clip(b"", "one", seconds, "here") for seconds in (0.5, 2.0, 1.0)]) == 2.0
    skipped = [SkippedClip(f"m.jsonl:{line}", "bad") for line in range(1, 8)]
    assert describe_skipped(skipped).startswith("7 clips skipped: m.jsonl:1: bad; m.jsonl:2: bad; ")
    assert describe_skipped(skipped).endswith("; m.jsonl:5: bad; and 2 more")


@pytest.mark.parametrize(("sampling_rate", "channels"), [(16000, 1), (8000, 1), (44100, 2)])
def test_audio_is_mono_float32_at_the_rate_asked_for(
    make_clip: MakeClip, tmp_path: Path, sampling_rate: int, channels: int
) -> None:
    path = make_clip(tmp_path / "a.flac", 0.5, sampling_rate=sampling_rate, channels=channels)
    reference = make_clip(tmp_path / "b.flac", 0.5)
    audio = read_audio(Clip(path, "one", 0.5, "here"))
    assert audio.dtype == np.float32
    assert audio.shape == (8000,)
    expected, _ = soundfile.read(reference, dtype="float32")
    middle = slice(1000, 7000)  # resampling rings at the ends; the noise of the clips differs
    assert np.corrcoef(audio[middle], expected[middle])[0, 1] > 0.99


def test_stereo_is_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile([[0.5, -0.25]], (100, 1)), 16000)
    assert read_audio(Clip(tmp_path / "a.wav", "one", 0.1, "here")) == pytest.approx(0.125, abs=1e-4)


def test_audio_that_breaks_off_names_its_line(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "long.flac", 1.25)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(100))
    (clip,) = load_manifest(write_lines(tmp_path, {"audio": "long.flac", "text": "one"})).clips
    with pytest.raises(SpeechDataError, match=r"manifest\.jsonl:1: .*long\.flac cannot be decoded"):
        read_audio(clip)


def test_an_mp3_cut_short_is_refused_though_it_decodes(tmp_path: Path) -> None:
    wave = np.sin(np.arange(32000) / 5) * 0.3
    soundfile.write(tmp_path / "a.mp3", wave, 16000)
    (clip,) = load_manifest(write_lines(tmp_path, {"audio": "a.mp3", "text": "one"})).clips
    assert len(read_audio(clip)) == 32000
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    (clip,) = load_manifest(write_lines(tmp_path, {"audio": "a.mp3", "text": "one"})).clips
    with pytest.raises(SpeechDataError, match=r"manifest\.jsonl:1: .*a\.mp3 breaks off after .* s of the 2\.00 s"):
        read_audio(clip)


def test_audio_with_nan_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(SpeechDataError, match=r"here: .*a\.wav holds NaN or infinity"):
        read_audio(Clip(tmp_path / "a.wav", "one", 0.1, "here"))


def test_the_digest_of_clips_covers_recordings_texts_languages_and_order(clips: list[Clip], manifest: Path) -> None:
    digest = clips_digest(clips)
    assert digest == clips_digest(load_manifest(manifest).clips)
    as_bytes = [dataclasses.replace(clip, audio=Path(str(clip.audio)).read_bytes(), source="row") for clip in clips]
    assert clips_digest(as_bytes) == digest
    for other in (
        clips[::-1],
        clips[1:],
        [dataclasses.replace(clips[0], text="else"), *clips[1:]],
        [dataclasses.replace(clips[0], language="nl"), *clips[1:]],
        [dataclasses.replace(clips[0], audio=b"else"), *clips[1:]],
    ):
        assert clips_digest(other) != digest
