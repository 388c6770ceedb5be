"""What a run is built of: the clips of both splits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset

from condft.recipe.data import SpeechSplits, load_speech, usable_examples
from condft.recipe.model import compose, window_of
from condft.tasks.speech import Clip, SpeechCollator, SpeechDataError
from condft.training import RunConfig
from condft.training.config import DataConfig
from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_clip, write_manifest


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    return save_whisper(folder / "whisper"), save_language_model(folder / "llama")


def clips(*speakers: str | None) -> list[Clip]:
    return [Clip(Path("a.flac"), "one", 1.0, "here", speaker=speaker) for speaker in speakers]


@pytest.mark.parametrize(
    ("train", "test", "new"),
    [
        (["a", "b"], ["c"], True),
        (["a", "b"], ["c", "b"], False),
        (["a", None], ["c"], False),
        (["a"], [None], False),
        ([None], [None], False),
    ],
)
def test_speakers_are_new_only_if_all_are_named_and_none_is_shared(
    train: list[str | None], test: list[str | None], new: bool
) -> None:
    assert SpeechSplits(clips(*train), clips(*test)).has_new_speakers is new


def test_a_dataset_of_several_configurations_and_what_each_split_skips(tmp_path: Path) -> None:
    good = write_clip(tmp_path / "good.flac", 0.5).read_bytes()
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        rows = {"audio": [{"bytes": b"no audio", "path": "a.flac"}, {"bytes": good, "path": "b.flac"}]}
        dataset = Dataset.from_dict({**rows, "text": ["one", "two"]}).cast_column("audio", Audio(decode=False))
        dataset.to_parquet(tmp_path / "data" / f"{name}.parquet")
    files = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("train", "test"))
    listed = "".join(f"- config_name: {name}\n  data_files:\n{files}" for name in ("en", "de"))
    folder = tmp_path / "data"
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    with pytest.raises(ValueError, match=r"data\[train\] row 0: audio of 8 bytes is not readable"):
        load_speech(DataConfig(dataset=str(folder), dataset_config="de"))
    speech = load_speech(DataConfig(dataset=str(folder), dataset_config="de", skip_bad=True))
    assert (len(speech.train), len(speech.test), speech.num_skipped) == (1, 1, 2)
    assert speech.train[0].source == f"{folder}[train] row 1"


BAD = {
    "a control token": ({}, "one <|im_end|> two", "holds the control token '<|im_end|>'"),
    "too long a text": ({}, "one " * 100, "the language model takes at most 256"),
    "a text without a word": ({}, "...!", "has no word to compare with"),
    "truncated": ({"seconds": 0.8, "cut": True}, "one", "cannot be decoded"),
    "NaN": ({"nan": True}, "one", "holds NaN or infinity"),
    "too short": ({"seconds": 0.02}, "one", "too short for one feature"),
    "beyond the window": ({"seconds": 31}, "one", "more than the 30 s allowed"),
}


def write_bad_clip(path: Path, *, seconds: float = 0.3, cut: bool = False, nan: bool = False) -> str:
    path = write_clip(path.with_suffix(".flac"), seconds, seed=7)
    if cut:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(100))
    if nan:
        path = path.with_suffix(".wav")
        soundfile.write(path, np.full(4000, np.nan), 16000, subtype="FLOAT")
    return path.name


@pytest.mark.parametrize("kind", BAD)
def test_what_no_batch_can_hold_is_named_before_a_run_begins_or_skipped(
    parts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))
    manifest = write_manifest(tmp_path, [0.3, 0.4, 0.5, 0.6], num_test=2)
    flaws, text, message = BAD[kind]
    audio = write_bad_clip(tmp_path / "bad", **flaws)
    with manifest.open("a") as file:
        file.write(json.dumps({"audio": audio, "text": text, "split": "test"}) + "\n")

    def prepare(skip_bad: bool) -> tuple[int, int]:
        config = RunConfig.model_validate(
            {
                "output_dir": str(tmp_path / "run"),
                "model": {"audio_tower": parts[0], "language_model": parts[1]},
                "data": {"manifest": str(manifest), "skip_bad": skip_bad},
                "training": {"steps": 1},
            }
        )
        speech = load_speech(config.data, window=window_of(config))
        model, processor = compose(config, max_seconds=speech.longest_seconds)
        collator = SpeechCollator.for_model(model, processor)
        examples, bad = usable_examples(model, collator, speech.test, config, skip_bad=skip_bad, compared=True)
        speech = speech.without([], bad)
        assert [example["source"] for example in examples] == [clip.source for clip in speech.test]
        return len(examples), speech.num_skipped

    with pytest.raises(SpeechDataError, match=rf"manifest\.jsonl:5: .*{re.escape(message)}"):
        prepare(skip_bad=False)
    assert prepare(skip_bad=True) == (2, 1)
