"""What a run is built of: the clips of both splits."""

from pathlib import Path

import pytest
from datasets import Audio, Dataset

from condft.multimodal import Clip
from condft.recipe.build import Speech, load_speech
from condft.training.config import DataConfig
from tests.tiny_speech import write_clip


def clips(*speakers: str | None) -> list[Clip]:
    return [Clip(Path("a.flac"), "one", 1.0, "here", speaker=speaker) for speaker in speakers]


@pytest.mark.parametrize(
    ("train", "test", "unheard"),
    [
        (["a", "b"], ["c"], True),
        (["a", "b"], ["c", "b"], False),
        (["a", None], ["c"], False),
        (["a"], [None], False),
        ([None], [None], False),
    ],
)
def test_voices_are_unheard_only_if_all_are_named_and_none_is_shared(
    train: list[str | None], test: list[str | None], unheard: bool
) -> None:
    assert Speech(clips(*train), clips(*test), 0).unheard_voices is unheard


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
