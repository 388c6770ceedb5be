"""The training objective: cross entropy on answer tokens, and nothing computed for the rest."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not part of an answer (transformers' convention)."""


def count_answer_tokens(labels: Tensor) -> Tensor:
    """How many tokens of `labels` (B, T) the loss is taken over; the first column has nothing before it."""
    return (labels[:, 1:] != IGNORED).sum()


def answer_loss_sum(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The summed (not averaged) cross entropy of the answer tokens of one left-padded batch, in nats.

    Left padding puts the answers at the right edge, so logits are asked for (`logits_to_keep`) from the position
    before the earliest answer token on: none for prompt and audio positions, where a large vocabulary costs most.

    Args:
        model: Called with the batch's tensors but `labels`; returns an output with `.logits`.
        batch: `input_ids` (B, T), `labels` (B, T; -100 outside the answers), and the model's other inputs. Where
            there is an `attention_mask` (B, T) and no `position_ids`, positions are counted from it.

    Returns:
        fp32 scalar with a graph.

    Raises:
        ValueError: No label in the batch is an answer token.
    """
    labels = batch["labels"]
    length = labels.shape[1]
    answered = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
    if answered.numel() == 0:
        raise ValueError(f"a batch of {labels.shape[0]} examples has no answer token: every label is {IGNORED}")
    keep = length - int(answered[0])  # `answered` is shifted by one: this is the column before the first answer
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    if "attention_mask" in inputs and "position_ids" not in inputs:
        # Where positions are looked up in a table (GPT-2, OPT), those of a padded row would start late; rotary ones
        # only count distances. `generate` counts them so too.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]
    targets = labels[:, length - keep + 1 :]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
