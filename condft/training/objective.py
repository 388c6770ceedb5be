"""The training objective: cross entropy of answer tokens, without computing logits for the rest."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from condft.tasks.chat import IGNORED

__all__ = ["answer_loss_sum", "count_answer_tokens"]


def count_answer_tokens(labels: Tensor) -> Tensor:
    """Number of tokens of `labels` `(batch, length)` that the loss is taken over: a scalar tensor.

    The first column does not count: there is no logit before it that would predict it.

    >>> import torch
    >>> count_answer_tokens(torch.tensor([[-100, -100, 5, 7]]))
    tensor(2)
    """
    return (labels[:, 1:] != IGNORED).sum()


def answer_loss_sum(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The cross entropy of the answer tokens of one left-padded batch, in nats: their sum, not their mean.

    With padding on the left, all answers end at the right edge. So logits are computed (`logits_to_keep`) only from
    the position before the first answer token on. Prompt and audio positions are most of the sequence, and with a
    large vocabulary their logits would be most of the memory.

    Args:
        model: Called with the batch's tensors except `labels`. Returns an output with `.logits`.
        batch: `input_ids` and `labels`, `(batch, length)`, long, labels -100 outside of the answers; and the model's
            other inputs. If there is an `attention_mask` and no `position_ids`, positions are counted from the mask.

    Returns:
        fp32 scalar with a graph.

    Raises:
        ValueError: No label in the batch is an answer token.

    >>> batch = {"input_ids": token_ids, "labels": token_ids}
    >>> mean = answer_loss_sum(base, batch) / count_answer_tokens(batch["labels"])
    >>> (mean - base(**batch).loss).abs().item() < 1e-5
    True
    """
    labels = batch["labels"]
    length = labels.shape[1]
    answered = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
    if answered.numel() == 0:
        raise ValueError(f"a batch of {labels.shape[0]} examples has no answer token: every label is {IGNORED}")
    keep = length - int(answered[0])  # `answered` is shifted by one: its first column is the one before the answer
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    if "attention_mask" in inputs and "position_ids" not in inputs:
        # Without this, padding would shift the positions of a row. That changes nothing with rotary embeddings, which
        # see distances only, but models with a table of positions (GPT-2, OPT) would compute something else than
        # `generate`, which counts from the mask too.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    targets = labels[:, length - keep + 1 :]
    # The sum: the caller divides by the answer tokens of the global batch, which this process does not know.
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
