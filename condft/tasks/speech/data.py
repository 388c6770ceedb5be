"""Clips from a JSON Lines manifest or from any `datasets` dataset, checked before training.

    {"audio": "audio/0001.flac", "text": "four two", "language": "en", "speaker": "anna", "split": "train"}

A manifest has one such object on each line. `audio` is relative to the manifest's folder. The header of every clip is
read when the manifest is loaded, so a bad clip is an error with file and line before training, not after hours of it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
from tqdm import tqdm

from condft.tasks.speech.clips import UNDETERMINED, Clip, SkippedClip, SpeechData, SpeechDataError, as_file, describe

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_manifest", "load_speech_dataset"]


def load_manifest(
    path: str | Path, *, split: str | None = None, max_seconds: float | None = None, skip_bad: bool = False
) -> SpeechData:
    """Reads a JSON Lines manifest and the header of every clip in it.

    Args:
        path: The manifest. Each line has `audio` and `text`, and may have `language`, `speaker` and `split`.
        split: Take clips of this split only; None takes all.
        max_seconds: Clips longer than this are bad.
        skip_bad: Leave bad clips out and list them in `skipped`, instead of stopping at the first.

    Returns:
        The clips, at least one.

    Raises:
        SpeechDataError: A bad clip (without `skip_bad`), no clip at all, none in `split`, or only bad ones.
        FileNotFoundError: `path` is not a file.

    >>> data = load_manifest("clips/manifest.jsonl", split="train", max_seconds=30)
    >>> [clip.text for clip in data.clips]
    ['zero one', 'one two', 'two three']
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: a manifest is a JSON Lines file, one object for each clip")
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
    """Takes clips from a `datasets.Dataset`. soundfile decodes them, so torchcodec is not needed.

    Args:
        dataset: One split, with a column of audio (an `Audio` feature, or paths) and a column of texts.
        audio_column: Name of the column of audio.
        text_column: Name of the column of texts.
        language_column: Name of the column of languages, if there is one.
        speaker_column: Name of the column of speakers, if there is one.
        name: Name of the dataset, for messages and the clips' `source`.
        max_seconds: As in `load_manifest`.
        skip_bad: As in `load_manifest`.

    Returns:
        The clips, at least one. Clips without a file on disk hold their encoded bytes.

    Raises:
        SpeechDataError: As in `load_manifest`, or a column is missing.
        TypeError: `dataset` is a dictionary of splits, or a stream.

    >>> from datasets import Dataset
    >>> dataset = Dataset.from_dict({"audio": ["clips/audio/0.flac"], "sentence": ["zero one"]})
    >>> data = load_speech_dataset(dataset, text_column="sentence", name="digits")
    >>> data.clips[0].source, data.clips[0].seconds
    ('digits row 0', 0.4)
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


def _collect(
    rows: Iterator[tuple[str, Any]],
    parse: Callable[[Any], dict[str, Any]],
    origin: str,
    split: str | None,
    max_seconds: float | None,
    skip_bad: bool,
) -> SpeechData:
    """Parses every row, filters by split and checks the clips."""
    clips: list[Clip] = []
    skipped: list[SkippedClip] = []
    splits: set[str | None] = set()
    for source, row in tqdm(rows, desc="checking clips", unit="clip", delay=2):  # no bar if it takes less than 2 s
        try:
            values = parse(row)
            # Before the recording is looked at: a bad one of another split does not stop this one.
            if split is not None and values["split"] != split:
                splits.add(values["split"])
                continue
            clips.append(Clip(seconds=_checked_seconds(values["audio"], max_seconds), source=source, **values))
        except _BadClipError as error:
            if not skip_bad:
                hint = "Repair it, or leave bad clips out with skip_bad=True (--skip-bad)."
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
    """Why one row cannot be used. `_collect` adds its source."""


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _manifest_row(line: bytes, folder: Path, *, need_split: bool) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # -sig: some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise _BadClipError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _BadClipError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise _BadClipError(f"not a JSON object but a {type(row).__name__}")
    for key in ("audio", "text", "split") if need_split else ("audio", "text"):
        if key not in row:
            raise _BadClipError(f"no field {key!r}; the fields are {sorted(row)}")
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
    name = describe(audio)
    if isinstance(audio, Path):
        if not audio.is_file():
            raise _BadClipError(f"the audio file {name} does not exist")
        if audio.stat().st_size == 0:
            raise _BadClipError(f"the audio file {name} is empty (0 bytes)")
    try:
        info = soundfile.info(as_file(audio))
    except (soundfile.SoundFileError, OSError) as error:
        raise _BadClipError(f"{name} is not readable as audio ({error})") from error
    if info.frames <= 0:
        raise _BadClipError(f"{name} holds no samples")
    seconds = info.frames / info.samplerate
    if max_seconds is not None and seconds > max_seconds:
        raise _BadClipError(f"{name} lasts {seconds:.2f} s, more than the {max_seconds:g} s allowed (max_seconds)")
    return seconds
