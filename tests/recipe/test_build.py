"""What a run is built of: the clips of both splits."""

from pathlib import Path

import pytest

from condft.multimodal import Clip
from condft.recipe.build import Speech


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
