"""The forward of a causal LM from a layer upwards: what a change of one weight cannot reach is computed once.

A change in layer l leaves everything below it as it was, so the inputs of all layers are kept for fixed texts and a
changed weight is measured from its own layer on: on average half the work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condft.runtime.model_mode import measuring

_LOG_SOFTMAX_ROWS = 256  # rows of the vocabulary held at once


class Continuation:
    """Runs the upper part of a Llama-shaped causal LM (`model.model.layers`, `norm`, `rotary_emb`, `lm_head`)."""

    def __init__(self, model: Any) -> None:
        self.model, self._body = model, model.model

    def inputs_of_layers(self, tokens: Tensor) -> list[Tensor]:
        """The hidden states before each layer: one `(num_windows, window, hidden)` a layer."""
        with torch.no_grad():
            hidden = [self._body.embed_tokens(tokens)]
            for layer in range(len(self._body.layers) - 1):
                hidden.append(self._through(hidden[-1], layer, layer + 1))
        return hidden

    def final_hidden(self, hidden: Tensor, layer: int) -> Tensor:
        """From the input of a layer to the normalized state that the output head reads, of the same shape."""
        return self._body.norm(self._through(hidden, layer, len(self._body.layers)))

    def logits(self, final_hidden: Tensor) -> Tensor:
        """`(..., vocabulary)`."""
        return self.model.lm_head(final_hidden)

    def _through(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = self._body.rotary_emb(hidden, position_ids=positions)
        for layer in self._body.layers[start:stop]:
            # no mask: whole windows without padding, where transformers' sdpa attention is causal by itself
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return hidden


@dataclass(frozen=True)
class Change:
    """What a changed weight did to a text.

    Attributes:
        cross_entropy: Change of the mean cross-entropy, nats per token.
        standard_error: Of that, over the windows.
        kl: Mean KL(base ‖ changed) a token, nats; None where it was not asked for.
    """

    cross_entropy: float
    standard_error: float
    kl: float | None


class FixedText:
    """Windows of a text with all that the base model computes on them.

    Args:
        continuation: Of the base model, unchanged at this time.
        tokens: `(num_windows, window)`, long; two windows or more.
        with_kl: Keep the base's distributions (`num_tokens · vocabulary` numbers) for the KL divergence.
    """

    def __init__(self, continuation: Continuation, tokens: Tensor, *, with_kl: bool) -> None:
        self._continuation, self._targets = continuation, tokens[:, 1:].flatten().split(_LOG_SOFTMAX_ROWS)
        self._windows = len(tokens)
        with measuring(continuation.model):
            self._inputs = continuation.inputs_of_layers(tokens)
            rows = list(self._log_probabilities(len(self._inputs) - 1))
        self._losses = _losses(rows, self._targets)
        self._base = rows if with_kl else None

    @property
    def cross_entropy(self) -> float:
        """Of the base, nats per token."""
        return float(self._losses.mean())

    def change(self, layer: int) -> Change:
        """Against the base, of a model whose weights below `layer` are the base's."""
        with measuring(self._continuation.model):
            rows = list(self._log_probabilities(layer))
        difference = (_losses(rows, self._targets) - self._losses).view(self._windows, -1).mean(dim=1)
        error = float(difference.std()) / self._windows**0.5
        return Change(float(difference.mean()), error, None if self._base is None else _mean_kl(self._base, rows))

    def _log_probabilities(self, layer: int) -> Iterator[Tensor]:
        hidden = self._continuation.final_hidden(self._inputs[layer], layer)[:, :-1].flatten(0, 1)
        for rows in hidden.split(_LOG_SOFTMAX_ROWS):
            yield self._continuation.logits(rows).log_softmax(-1)


def _losses(log_probabilities: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    pairs = zip(log_probabilities, targets, strict=True)
    return -torch.cat([rows.gather(1, wanted[:, None])[:, 0] for rows, wanted in pairs]).double()


def _mean_kl(base: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    pairs = zip(base, ours, strict=True)
    total = sum(F.kl_div(b, a, reduction="none", log_target=True).double().sum().item() for a, b in pairs)
    return total / sum(len(rows) for rows in base)
