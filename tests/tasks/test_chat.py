"""Chat messages, labels and padding that all tasks share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.tasks.chat import IGNORED, conversation, pad_left


def test_a_system_prompt_comes_first_and_may_be_empty() -> None:
    user = {"role": "user", "content": [{"type": "audio"}]}
    assert conversation(user["content"]) == [user]
    assert conversation(user["content"], "Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    assert conversation(user["content"], "")[0] == {"role": "system", "content": ""}


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4))
def test_rows_end_at_the_right_edge(rows: list[list[int]]) -> None:
    padded = pad_left(rows, -1)
    assert padded.dtype == torch.long
    assert padded.shape == (len(rows), max(map(len, rows)))
    for row, expected in zip(padded.tolist(), rows, strict=True):
        assert row == [-1] * (padded.shape[1] - len(expected)) + expected


def test_ignored_labels_have_no_loss() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([IGNORED, 2, IGNORED])
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits[1], labels[1]).item())
