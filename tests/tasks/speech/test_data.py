"""Manifests and datasets: good ones are read whole, every kind of bad clip is named with its place."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from condft.tasks.speech import Clip, SpeechDataError, load_manifest, load_speech_dataset, read_audio
from condft.tasks.speech.clips import describe_skipped, longest_seconds
from tests.helpers.models.tiny_speech import write_lines

MakeClip = Callable[..., Path]


def test_a_manifest_is_read_in_order_with_all_fields(manifest: Path) -> None:
    data = load_manifest(manifest)
    assert [clip.seconds for clip in data.clips] == [0.4, 1.5, 0.9, 0.66]
    second = data.clips[1]
    assert (second.text, second.language, second.speaker, second.split) == ("one two", "de", "speaker-1", "train")
    assert second.source == f"{manifest}:2"
    assert data.skipped == []
    assert longest_seconds(data.clips) == 1.5


def test_splits_are_kept_apart_and_an_unknown_one_names_those_there_are(manifest: Path) -> None:
    assert len(load_manifest(manifest, split="train").clips) == 3
    assert len(load_manifest(manifest, split="test").clips) == 1
    with pytest.raises(SpeechDataError, match=r"no clip in split 'dev'; its splits are \['test', 'train'\]"):
        load_manifest(manifest, split="dev")


def test_optional_fields_and_blank_lines_may_be_left_out(make_clip: MakeClip, tmp_path: Path) -> None:
    make_clip(tmp_path / "a.wav", 0.1)
    (clip,) = load_manifest(write_lines(tmp_path, "", {"audio": "a.wav", "text": "one"}, "")).clips
    assert (clip.language, clip.speaker, clip.split) == ("und", None, None)
    assert clip.source.endswith(":2")


BAD_LINES = {
    "not-json": ("{'audio'", "not JSON"),
    "not-object": ([1], "not a JSON object but a list"),
    "no-text": ({"audio": "good.flac"}, r"no field .text.; the fields are \['audio'\]"),
    "no-audio": ({"text": "one"}, "no field 'audio'"),
    "text-type": ({"audio": "good.flac", "text": 3}, "field 'text' must be a string, not int"),
    "language-type": ({"audio": "good.flac", "text": "one", "language": []}, "'language' must be a string, not list"),
    "empty-text": ({"audio": "good.flac", "text": " \t"}, "the text is empty"),
    "missing": ({"audio": "no.flac", "text": "one"}, r"no\.flac does not exist"),
    "folder": ({"audio": ".", "text": "one"}, "does not exist"),
    "empty-file": ({"audio": "empty.flac", "text": "one"}, r"empty\.flac is empty \(0 bytes\)"),
    "unreadable": ({"audio": "noise.flac", "text": "one"}, r"noise\.flac is not readable as audio"),
    "too-long": ({"audio": "long.flac", "text": "one"}, r"lasts 1\.25 s, more than the 1 s allowed"),
    "no-samples": ({"audio": "silent.wav", "text": "one"}, r"silent\.wav holds no samples"),
}


@pytest.fixture
def folder(make_clip: MakeClip, tmp_path: Path) -> Path:
    make_clip(tmp_path / "good.flac", 0.5)
    make_clip(tmp_path / "long.flac", 1.25)
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "empty.flac").touch()
    (tmp_path / "noise.flac").write_bytes(b"no audio at all")
    return tmp_path


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(folder: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    manifest = write_lines(folder, {"audio": "good.flac", "text": "one"}, line)
    with pytest.raises(SpeechDataError, match=rf"manifest\.jsonl:2: .*{message}.*skip_bad"):
        load_manifest(manifest, max_seconds=1)
    data = load_manifest(manifest, max_seconds=1, skip_bad=True)
    assert len(data.clips) == 1
    assert data.skipped[0].source == f"{manifest}:2"
    assert describe_skipped(data.skipped).startswith(f"1 clip skipped: {manifest}:2: ")
    assert describe_skipped([]) == "no clip skipped"


def test_only_bad_clips_or_none_is_an_error_even_when_skipping(folder: Path) -> None:
    with pytest.raises(SpeechDataError, match=r"no usable clip, 2 bad ones; the first, .*:1: not JSON"):
        load_manifest(write_lines(folder, "?", "[]"), skip_bad=True)
    with pytest.raises(SpeechDataError, match="is empty: it lists no clip"):
        load_manifest(write_lines(folder), skip_bad=True)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl is no file"):
        load_manifest(folder / "absent.jsonl")


def test_a_split_asked_for_must_be_a_field(folder: Path) -> None:
    with pytest.raises(SpeechDataError, match="no field 'split'"):
        load_manifest(write_lines(folder, {"audio": "good.flac", "text": "one"}), split="train")


def test_a_clip_of_no_split_is_in_none(folder: Path) -> None:
    clip = {"audio": "good.flac", "text": "one"}
    path = write_lines(folder, {**clip, "split": None}, {**clip, "split": "dev"})
    with pytest.raises(SpeechDataError, match=r"no clip in split 'train'; its splits are \[None, 'dev'\]"):
        load_manifest(path, split="train")


def test_a_byte_order_mark_costs_no_clip(folder: Path) -> None:
    line = b'{"audio": "good.flac", "text": "one"}\r\n'
    (folder / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + line + line)  # as some editors save UTF-8
    assert [clip.text for clip in load_manifest(folder / "manifest.jsonl").clips] == ["one", "one"]


def test_bytes_that_are_not_utf8_are_named(folder: Path) -> None:
    (folder / "manifest.jsonl").write_bytes(b'{"audio": "\xff"}\n')
    with pytest.raises(SpeechDataError, match=r":1: not UTF-8 .* at byte 11"):
        load_manifest(folder / "manifest.jsonl")


@pytest.mark.parametrize("kind", ["path", "audio", "bytes"])
def test_a_dataset_gives_the_same_clips_as_files(manifest: Path, clips: list[Clip], kind: str) -> None:
    paths = [str(clip.audio) for clip in clips]
    audio: list[object] = list(paths)
    if kind == "bytes":
        audio = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    columns = {"sound": audio, "words": [clip.text for clip in clips], "lang": [clip.language for clip in clips]}
    dataset = Dataset.from_dict(columns)
    if kind == "audio":
        dataset = dataset.cast_column("sound", Audio(sampling_rate=8000))
    data = load_speech_dataset(dataset, audio_column="sound", text_column="words", language_column="lang")
    for loaded, clip in zip(data.clips, clips, strict=True):
        assert (loaded.text, loaded.language, loaded.seconds) == (clip.text, clip.language, clip.seconds)
        assert np.array_equal(read_audio(loaded), read_audio(clip))


def test_a_datasets_bad_rows_and_columns_are_named(clips: list[Clip]) -> None:
    rows = {"audio": [str(clips[0].audio), "no.flac"], "text": ["one", "two"]}
    dataset = Dataset.from_dict(rows)
    with pytest.raises(SpeechDataError, match=r"row 1: .*no\.flac does not exist"):
        load_speech_dataset(dataset)
    assert len(load_speech_dataset(dataset, skip_bad=True).skipped) == 1
    with pytest.raises(SpeechDataError, match=r"^fleurs\[train\] row 1: "):
        load_speech_dataset(dataset, name="fleurs[train]")
    with pytest.raises(SpeechDataError, match=r"no column 'speech'; it has \['audio', 'text'\]"):
        load_speech_dataset(dataset, audio_column="speech")
    with pytest.raises(TypeError, match=r"\(a split\), not DatasetDict"):
        load_speech_dataset(DatasetDict(train=dataset))


@settings(deadline=None)
@given(line=st.one_of(st.text(), st.from_type(type(None)), st.dictionaries(st.text(), st.integers() | st.text())))
def test_any_content_of_a_line_gives_our_error(tmp_path_factory: pytest.TempPathFactory, line: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes((line if isinstance(line, str) else json.dumps(line)).encode("utf-8", "surrogatepass"))
    with pytest.raises(SpeechDataError):
        load_manifest(path)
