"""Self-distillation: the KL divergence from the base, on text that the base wrote, as a part of the loss.

The base is the teacher. It is the same model within `disable_adapter`, so no second model is in memory, and the text
that it writes replaces the pre-training data.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from condft.runtime.model_mode import flags_kept, measuring

__all__ = ["SelfDistillation", "SelfDistillationConfig"]


class SelfDistillationConfig(BaseModel):
    """KL(base ‖ adapted), on text that the base model itself wrote, as a part of the loss. No old data is needed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    weight: float = Field(default=10.0, gt=0, description="Factor of the KL (nats a token) in the loss.")
    every: int = Field(default=2, ge=1, description="Optimizer steps from one such step to the next.")
    per_device_batch_size: int = Field(default=4, ge=1, description="Sequences in a micro-batch of it.")
    num_sequences: int = Field(default=128, ge=1, description="Sequences that the base writes before training.")
    num_tokens: int = Field(default=64, ge=1, description="Tokens of each.")


class SelfDistillation:
    r"""Adds $\lambda\,\mathrm{KL}(p_\text{base} \,\|\, p_\text{adapted})$ to the loss of every n-th optimizer step.

    The mean over the next-token distributions along the text, in nats a token, so that λ does not depend on how much
    text a step reads. The texts of a step are the same however it is divided between ranks and micro-batches.

    Args:
        settings: Weight, interval and batch size; how much text there is was the sampling's business.
        tokens: `(num_sequences, length)`, long, from `condft.evaluation.sample_from_base`; the same on every rank.
        base: Within it the trained model is the base: `peft_model.disable_adapter`.
        seed: Of the order in which the texts are read.

    Raises:
        ValueError: Sequences of fewer than 2 tokens.
    """

    def __init__(
        self,
        settings: SelfDistillationConfig,
        tokens: Tensor,
        base: Callable[[], AbstractContextManager[Any]],
        *,
        seed: int,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: needs at least one sequence of at least 2")
        self.settings, self.tokens, self.seed, self._base = settings, tokens, seed, base

    def kl_to_base(self, wrapped: nn.Module, model: nn.Module, tokens: Tensor) -> Tensor:
        """The mean KL(base ‖ adapted) along `tokens`, in nats a token: an fp32 scalar with a graph.

        Args:
            wrapped: What trains, as the engine prepared it.
            model: The model in it, which `base` acts on.
            tokens: `(size, length)`, long.
        """
        inputs = tokens[:, :-1]
        # Before the base's forward: FSDP2 reads which parameters train at the first forward of the run, and within
        # `disable_adapter` none does.
        adapted = wrapped(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)
        with measuring(model), flags_kept(model), self._base():
            target = model(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)
        return F.kl_div(adapted, target, reduction="sum", log_target=True) / inputs.numel()
