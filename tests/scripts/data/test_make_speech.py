"""The speech dataset, really spoken: eSpeak NG comes with the development dependencies."""

import json
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from scripts.data import make_speech

SMALL = ["--train", "6", "--test", "4"]


def make(folder: Path, *options: str) -> int:
    return make_speech.main(["--into", str(folder), *SMALL, *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entries(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "digits"
    assert make(folder) == 0
    return folder


def test_manifest_and_audio_are_what_they_say(dataset: Path) -> None:
    assert sorted(p.name for p in dataset.parent.iterdir()) == ["digits"]
    listed = entries(dataset)
    assert [e["split"] for e in listed] == ["train"] * 6 + ["test"] * 4
    assert [e["language"] for e in listed] == ["en", "de"] * 5
    for entry in listed:
        assert list(entry) == ["audio", "text", "language", "speaker", "split"]
        words = entry["text"].split(" ")
        assert 2 <= len(words) <= 4
        assert set(words) <= set(make_speech.WORDS[entry["language"]])
        info = soundfile.info(dataset / entry["audio"])
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert 0.3 < info.duration < make_speech.MAX_SECONDS
    assert {e["audio"] for e in listed} == {str(p.relative_to(dataset)) for p in dataset.glob("audio/*")}


def test_same_seed_same_bytes_and_more_clips_begin_with_the_fewer(dataset: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(dataset)
    assert make(tmp_path / "more", "--train", "8") == 0
    more = contents(tmp_path / "more")
    assert len(more) == len(contents(dataset)) + 2
    for name, content in contents(dataset).items():
        assert name in ("manifest.jsonl", "dataset.json") or more[name] == content


def test_another_seed_says_something_else(dataset: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "other", "--seed", "1") == 0
    assert [e["text"] for e in entries(tmp_path / "other")] != [e["text"] for e in entries(dataset)]


@given(seed=st.integers(-(2**40), 2**40), index=st.integers(0, 10**6))
def test_no_speaker_is_in_both_splits(seed: int, index: int) -> None:
    sides = make_speech.split_variants(seed)
    assert set(sides["train"]).isdisjoint(sides["test"])
    assert sorted(sides["train"] + sides["test"]) == sorted(make_speech.VARIANTS)
    for split in make_speech.SPLITS:
        clip = make_speech.draw_clip(seed, split, index)
        base, variant = clip.speaker.split("+")
        assert variant in sides[split]
        assert base in make_speech.BASE_SPEAKERS[clip.language]
        assert make_speech.draw_clip(seed, split, index) == clip


def test_a_finished_dataset_is_left_alone(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    assert make(dataset) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before


def test_another_dataset_is_not_overwritten_but_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits"
    assert make(folder) == 0
    before = contents(folder)
    assert make(folder, "--seed", "4") == 1
    assert "seed 0 there, 4 asked for. Give another --into, or --force" in capsys.readouterr().err
    assert contents(folder) == before
    assert make(folder, "--seed", "4", "--force") == 0
    assert contents(folder) != before
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_a_changed_missing_or_foreign_file_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits"
    assert make(folder) == 0
    first = folder / "audio" / "train-00000.flac"
    first.write_bytes(first.read_bytes() + b"\0")
    assert make(folder) == 1
    assert "was changed since it was written" in capsys.readouterr().err
    first.unlink()
    assert make(folder) == 1
    assert f"{first} is missing" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert make(tmp_path / "mine") == 1
    assert "is no dataset of this script" in capsys.readouterr().err


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_speech.BASE_SPEAKERS, "de", ("xx-none",))
    assert make(tmp_path / "digits") == 1
    assert list(tmp_path.iterdir()) == []


def test_clips_that_stay_too_long_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_speech, "MAX_SECONDS", 0.05)
    with pytest.raises(make_speech.SpeechError, match=r"train clip 3: 20 draws were all 0\.05 s or longer"):
        make_speech.speak_within_limit(0, "train", 3)
    monkeypatch.setattr(make_speech, "MAX_SECONDS", 0.9)  # some draws fit, not the first of every clip
    lengths = [make_speech.speak_within_limit(0, "train", index)[1].size for index in range(6)]
    assert max(lengths) < 0.9 * 16_000


def test_too_few_clips_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make(tmp_path / "digits", "--test", "1")
    assert "--test 1: at least 2 clips" in capsys.readouterr().err
