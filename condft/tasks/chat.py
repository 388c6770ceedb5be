"""What all tasks share: chat messages, labels, and padding on the left."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "conversation", "pad_left"]

IGNORED = -100
"""Label of a token that is not part of an answer. torch's cross entropy ignores it, transformers' models too."""


def conversation(content: list[dict[str, str]], system_prompt: str | None = None) -> list[dict[str, Any]]:
    """Chat messages for `apply_chat_template`: one turn of the user, after an optional system prompt.

    Args:
        content: The items of the user's turn, such as `{"type": "audio"}` and `{"type": "text", "text": ...}`.
        system_prompt: Text of a system turn. None leaves it to the chat template.

    >>> conversation([{"type": "text", "text": "Hello"}])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hello'}]}]
    """
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": content}]


def pad_left(rows: list[list[int]], value: int) -> Tensor:
    """Rows of any lengths as one tensor `(rows, longest)`, long, filled up with `value` on the left.

    On the left, so that all answers end at the right edge: the loss asks for logits of the last positions only, and
    `generate` continues every row at its end.

    >>> pad_left([[1, 2], [3]], 0)
    tensor([[1, 2],
            [0, 3]])
    """
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + row for row in rows], dtype=torch.long)
