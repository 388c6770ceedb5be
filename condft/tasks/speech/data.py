"""Speech clips with their texts: from a JSON Lines manifest or any `datasets` dataset, checked before training.

    {"audio": "audio/0001.flac", "text": "four two", "language": "en", "speaker": "voice-3", "split": "train"}

One such object a line; `audio` is relative to the manifest's folder. Every clip's header is read up front, so a bad
one is reported with its file and line now, not in the third hour of training.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

try:
    import soundfile
    import soxr
except ImportError as error:
    raise ImportError("Speech needs soundfile and soxr: pip install 'condft[speech]'") from error

if TYPE_CHECKING:
    from datasets import Dataset

UNDETERMINED = "und"  # BCP 47's tag for a language nobody named
_CUT_SECONDS = 0.1  # so much of what the header tells may be missing: encoders pad, and decoders drop a frame or two


class SpeechDataError(ValueError):
    """A clip or manifest that cannot be used; the message starts with its file and line, or its dataset row."""


@dataclass(frozen=True)
class Clip:
    """One recording and what is said in it.

    Attributes:
        audio: A file, or the bytes of one, in any format that soundfile reads.
        text: What is said, not empty.
        seconds: Length of the recording.
        source: Where the clip was listed (`manifest.jsonl:12`), for messages.
        language: BCP 47 tag; `und` where the data does not say.
        speaker: Any name, or None.
        split: Such as `train` or `test`, or None.
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
        """Of the encoded recording; read once."""
        if isinstance(self.audio, bytes):
            return hashlib.sha256(self.audio).hexdigest()
        with self.audio.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class SkippedClip:
    """A clip left out under `skip_bad`, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class SpeechData:
    """Usable clips, in the order listed, and those left out."""

    clips: list[Clip]
    skipped: list[SkippedClip] = field(default_factory=list)


def load_manifest(
    path: str | Path, *, split: str | None = None, max_seconds: float | None = None, skip_bad: bool = False
) -> SpeechData:
    """Reads a JSON Lines manifest and the header of every clip in it.

    Args:
        path: The manifest. Each line holds `audio` and `text`, and may hold `language`, `speaker` and `split`.
        split: Only clips of this split; None takes all.
        max_seconds: Clips longer than this are bad.
        skip_bad: Leave bad clips out and report them in `skipped`, instead of stopping at the first.

    Returns:
        The clips, at least one.

    Raises:
        SpeechDataError: A bad clip (unless `skip_bad`), no clip at all, none in `split`, or only bad ones.
        FileNotFoundError: `path` is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: a manifest is a JSON Lines file, one object a clip")
    rows = ((f"{path}:{number}", line) for number, line in _iter_lines(path))

    def parse(line: bytes) -> dict[str, Any]:
        return _manifest_row(line, path.parent, need_split=split is not None)

    return _collect(rows, parse, str(path), split, max_seconds, skip_bad)


def load_speech_dataset(
    dataset: "Dataset",
    *,
    audio_column: str = "audio",
    text_column: str = "text",
    language_column: str | None = None,
    speaker_column: str | None = None,
    name: str = "the dataset",
    max_seconds: float | None = None,
    skip_bad: bool = False,
) -> SpeechData:
    """Takes clips from a `datasets.Dataset`; soundfile decodes them, so torchcodec is not needed.

    Args:
        dataset: One split, with an audio column (decoded or not, or paths) and a text column.
        audio_column: Name of the audio column.
        text_column: Name of the text column.
        language_column: Name of the column with the language, if there is one.
        speaker_column: Name of the column with the speaker, if there is one.
        name: Of the dataset, in messages and in the clips' `source`.
        max_seconds: As in `load_manifest`.
        skip_bad: As in `load_manifest`.

    Returns:
        The clips, at least one. Those without a file on disk hold their encoded bytes.

    Raises:
        SpeechDataError: As in `load_manifest`, or a column is missing.
        TypeError: `dataset` is a dictionary of splits or a stream.
    """
    from datasets import Audio, Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"load_speech_dataset takes one datasets.Dataset (a split), not {type(dataset).__name__}")
    columns = {"audio": audio_column, "text": text_column, "language": language_column, "speaker": speaker_column}
    chosen = {key: column for key, column in columns.items() if column is not None}
    if missing := sorted(set(chosen.values()) - set(dataset.column_names)):
        raise SpeechDataError(f"{name} has no column {missing[0]!r}; it has {sorted(dataset.column_names)}")
    undecoded = dataset.cast_column(audio_column, Audio(decode=False))
    rows = ((f"{name} row {index}", row) for index, row in enumerate(undecoded))

    def parse(row: Mapping[str, Any]) -> dict[str, Any]:
        return _dataset_row({key: row[column] for key, column in chosen.items()})

    return _collect(rows, parse, name, None, max_seconds, skip_bad)


def longest_seconds(clips: Iterable[Clip]) -> float:
    """Length of the longest clip in seconds (what the tower's window must cover); clips must not be empty."""
    return max(clip.seconds for clip in clips)


def clips_digest(clips: Iterable[Clip]) -> str:
    """SHA-256 over what training sees of clips, in their order: recordings, texts and languages."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.audio_sha256, clip.text, clip.language]).encode())
    return digest.hexdigest()


def describe_skipped(skipped: Sequence[SkippedClip]) -> str:
    """One line on what was left out, for a log: `2 clips skipped: m.jsonl:3: the text is empty; …`."""
    shown = "; ".join(f"{clip.source}: {clip.reason}" for clip in skipped[:5])
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    noun = "clip" if len(skipped) == 1 else "clips"
    return f"{len(skipped)} {noun} skipped: {shown}{more}" if skipped else "no clip skipped"


def read_audio(clip: Clip, sampling_rate: int = 16000) -> np.ndarray:
    """Decodes a clip.

    Args:
        clip: A clip of `load_manifest` or `load_speech_dataset`.
        sampling_rate: In hertz; other recordings are resampled to it.

    Returns:
        `(num_samples,)` float32 in about [-1, 1], channels averaged.

    Raises:
        SpeechDataError: The file cannot be decoded, breaks off, or holds no samples, NaN or infinity.
    """
    try:
        samples, rate = soundfile.read(_as_file(clip.audio), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise SpeechDataError(f"{clip.source}: {_describe(clip.audio)} cannot be decoded: {error}") from error
    mono = samples.mean(axis=1)
    if mono.size == 0 or not np.isfinite(mono).all():
        what = "no samples" if mono.size == 0 else "NaN or infinity"
        raise SpeechDataError(f"{clip.source}: {_describe(clip.audio)} holds {what}")
    # An MP3 that was cut short decodes without an error, and its whole text would be trained on half the recording.
    if len(mono) / rate < clip.seconds - _CUT_SECONDS:
        raise SpeechDataError(
            f"{clip.source}: {_describe(clip.audio)} breaks off after {len(mono) / rate:.2f} s of the "
            f"{clip.seconds:.2f} s that its header tells"
        )
    if rate != sampling_rate:
        mono = soxr.resample(mono, rate, sampling_rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _collect(
    rows: Iterator[tuple[str, Any]],
    parse: Callable[[Any], dict[str, Any]],
    origin: str,
    split: str | None,
    max_seconds: float | None,
    skip_bad: bool,
) -> SpeechData:
    """Parses, filters by split and checks every row. `delay`: no bar for what takes less than two seconds."""
    clips: list[Clip] = []
    skipped: list[SkippedClip] = []
    splits: set[str | None] = set()
    for source, row in tqdm(rows, desc="Checking clips", unit="clip", delay=2):
        try:
            values = parse(row)
            if split is not None and values["split"] != split:
                splits.add(values["split"])
                continue
            clips.append(Clip(seconds=_checked_seconds(values["audio"], max_seconds), source=source, **values))
        except _BadClipError as error:
            if not skip_bad:
                hint = "Mend it, or leave bad clips out with skip_bad=True (--skip-bad)."
                raise SpeechDataError(f"{source}: {error}. {hint}") from error
            skipped.append(SkippedClip(source, str(error)))
    if clips:
        return SpeechData(clips, skipped)
    if skipped:
        first = f"the first, {skipped[0].source}: {skipped[0].reason}"
        raise SpeechDataError(f"{origin} has no usable clip, {len(skipped)} bad ones; {first}")
    if splits:
        raise SpeechDataError(f"{origin} has no clip in split {split!r}; its splits are {sorted(splits, key=str)}")
    raise SpeechDataError(f"{origin} is empty: it lists no clip")


class _BadClipError(Exception):
    """Why one row cannot be used; `_collect` adds where it stands."""


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _manifest_row(line: bytes, folder: Path, *, need_split: bool) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # the first line may begin with a byte order mark
    except UnicodeDecodeError as error:
        raise _BadClipError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _BadClipError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise _BadClipError(f"not a JSON object but a {type(row).__name__}")
    for key in ("audio", "text", "split") if need_split else ("audio", "text"):
        if key not in row:
            raise _BadClipError(f"lacks the field {key!r}; it has {sorted(row)}")
    values = {key: _string(row, key) for key in ("audio", "text", "language", "speaker", "split")}
    values["language"] = values["language"] or UNDETERMINED
    return _with_text({**values, "audio": folder / str(values["audio"])})


def _dataset_row(row: dict[str, Any]) -> dict[str, Any]:
    audio = row["audio"]
    if audio is None or not (audio.get("bytes") or audio.get("path")):
        raise _BadClipError("the audio column is empty")
    values: dict[str, Any] = {key: _string(row, key) for key in ("text", "language", "speaker") if key in row}
    values["language"] = values.get("language") or UNDETERMINED
    return _with_text({**values, "audio": audio.get("bytes") or Path(audio["path"])})


def _string(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    optional = key not in ("audio", "text")
    if not (isinstance(value, str) or (optional and value is None)):
        raise _BadClipError(f"the field {key!r} must be a string, not {type(value).__name__}")
    return value


def _with_text(values: dict[str, Any]) -> dict[str, Any]:
    if not values["text"].strip():
        raise _BadClipError("the text is empty")
    return values


def _checked_seconds(audio: Path | bytes, max_seconds: float | None) -> float:
    """Length of a recording from its header alone."""
    name = _describe(audio)
    if isinstance(audio, Path):
        if not audio.is_file():
            raise _BadClipError(f"the audio file {name} does not exist")
        if audio.stat().st_size == 0:
            raise _BadClipError(f"the audio file {name} is empty (0 bytes)")
    try:
        info = soundfile.info(_as_file(audio))
    except (soundfile.SoundFileError, OSError) as error:
        raise _BadClipError(f"{name} is not readable as audio ({error})") from error
    if info.frames <= 0:
        raise _BadClipError(f"{name} holds no samples")
    seconds = info.frames / info.samplerate
    if max_seconds is not None and seconds > max_seconds:
        raise _BadClipError(f"{name} lasts {seconds:.2f} s, more than the {max_seconds:g} s allowed (max_seconds)")
    return seconds


def _as_file(audio: Path | bytes) -> str | io.BytesIO:
    return io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)


def _describe(audio: Path | bytes) -> str:
    return f"audio of {len(audio):,} bytes" if isinstance(audio, bytes) else str(audio)
