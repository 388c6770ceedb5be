"""Speech clips: recordings with their texts, decoded when they are needed."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
import soxr

__all__ = [
    "UNDETERMINED",
    "Clip",
    "SkippedClip",
    "SpeechData",
    "SpeechDataError",
    "as_file",
    "clips_digest",
    "describe",
    "describe_skipped",
    "longest_seconds",
    "read_audio",
]

UNDETERMINED = "und"  # BCP 47's tag for an unknown language
# A decoded clip may be this much shorter than its header says: encoders add padding, decoders drop a frame or two.
_CUT_SECONDS = 0.1


class SpeechDataError(ValueError):
    """A clip or manifest that cannot be used. The message begins with its file and line, or its dataset row.

    >>> from condft.tasks.speech import load_manifest
    >>> load_manifest("clips/manifest.jsonl", max_seconds=0.5)
    Traceback (most recent call last):
    condft.tasks.speech.clips.SpeechDataError: clips/manifest.jsonl:2: ...1.flac lasts 1.50 s, more than the 0.5 s ...
    """


@dataclass(frozen=True)
class Clip:
    """One recording and its text.

    Attributes:
        audio: A file, or the bytes of one, in any format that soundfile reads.
        text: The transcription, not empty.
        seconds: Length of the recording.
        source: Where the clip was listed (`manifest.jsonl:12`), for messages.
        language: BCP 47 tag; `und` if the data does not say.
        speaker: Name of the speaker, or None.
        split: Name of the split, such as `train` or `test`, or None.

    >>> from condft.tasks.speech import load_manifest
    >>> clip = load_manifest("clips/manifest.jsonl").clips[0]
    >>> clip.text, clip.seconds, clip.language, clip.split
    ('zero one', 0.4, 'en', 'train')
    """

    audio: Path | bytes = field(repr=False)
    text: str
    seconds: float
    source: str
    language: str = UNDETERMINED
    speaker: str | None = None
    split: str | None = None

    @cached_property
    def audio_sha256(self) -> str:
        """SHA-256 (64 hex digits) of the encoded recording. The file is read once."""
        if isinstance(self.audio, bytes):
            return hashlib.sha256(self.audio).hexdigest()
        with self.audio.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class SkippedClip:
    """A clip that was left out because of `skip_bad`, and the reason.

    >>> from condft.tasks.speech import load_manifest
    >>> data = load_manifest("clips/manifest.jsonl", max_seconds=1.0, skip_bad=True)
    >>> data.skipped[0].source
    'clips/manifest.jsonl:2'
    """

    source: str
    reason: str


@dataclass(frozen=True)
class SpeechData:
    """The usable clips, in the order listed, and the clips left out.

    >>> from condft.tasks.speech import load_manifest
    >>> data = load_manifest("clips/manifest.jsonl", max_seconds=1.0, skip_bad=True)
    >>> len(data.clips), len(data.skipped)
    (3, 1)
    """

    clips: list[Clip]
    skipped: list[SkippedClip] = field(default_factory=list)


def longest_seconds(clips: Iterable[Clip]) -> float:
    """Length of the longest clip in seconds, which the tower's window must cover. There must be at least one clip."""
    return max(clip.seconds for clip in clips)


def clips_digest(clips: Iterable[Clip]) -> str:
    """SHA-256 (64 hex digits) of what training sees of the clips, in order: recordings, texts and languages."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.audio_sha256, clip.text, clip.language]).encode())
    return digest.hexdigest()


def describe_skipped(skipped: Sequence[SkippedClip]) -> str:
    """One line for a log on the clips that were left out.

    >>> describe_skipped([SkippedClip("m.jsonl:3", "the text is empty")])
    '1 clip skipped: m.jsonl:3: the text is empty'
    """
    shown = "; ".join(f"{clip.source}: {clip.reason}" for clip in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    noun = "clip" if len(skipped) == 1 else "clips"
    return f"{len(skipped)} {noun} skipped: {shown}{more}" if skipped else "no clip skipped"


def read_audio(clip: Clip, sampling_rate: int = 16000) -> np.ndarray:
    """Decodes a clip.

    Args:
        clip: A clip of `load_manifest` or `load_speech_dataset`.
        sampling_rate: In hertz. Recordings of another rate are resampled to it.

    Returns:
        `(num_samples,)`, float32, about within [-1, 1]; channels are averaged.

    Raises:
        SpeechDataError: The file cannot be decoded, is cut short, or holds no samples, NaN or infinity.

    >>> from condft.tasks.speech import load_manifest
    >>> clip = load_manifest("clips/manifest.jsonl").clips[0]
    >>> read_audio(clip).shape  # 0.4 s of 16 kHz
    (6400,)
    """
    try:
        samples, rate = soundfile.read(as_file(clip.audio), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise SpeechDataError(f"{clip.source}: {describe(clip.audio)} cannot be decoded: {error}") from error
    mono = samples.mean(axis=1)
    if mono.size == 0 or not np.isfinite(mono).all():
        what = "no samples" if mono.size == 0 else "NaN or infinity"
        raise SpeechDataError(f"{clip.source}: {describe(clip.audio)} holds {what}")
    # An MP3 that was cut short decodes without an error. Training would pair its whole text with half a recording.
    if len(mono) / rate < clip.seconds - _CUT_SECONDS:
        raise SpeechDataError(
            f"{clip.source}: {describe(clip.audio)} breaks off after {len(mono) / rate:.2f} s of the "
            f"{clip.seconds:.2f} s that its header says"
        )
    if rate != sampling_rate:
        mono = soxr.resample(mono, rate, sampling_rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def as_file(audio: Path | bytes) -> str | io.BytesIO:
    """What soundfile reads: a path, or a file object of the bytes."""
    return io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)


def describe(audio: Path | bytes) -> str:
    """A recording in an error message: its path, or the number of its bytes."""
    return f"audio of {len(audio):,} bytes" if isinstance(audio, bytes) else str(audio)
