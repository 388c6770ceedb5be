"""Self-distillation: the divergence from the base, on text that the base itself writes, as part of the loss.

What is rehearsed so is not forgotten so fast, and no pre-training data is needed: the base is its own teacher, there
within `disable_adapter`, and its own text stands for what it was trained on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from condft.inference import flags_kept, measuring
from condft.training.config import SelfDistillationConfig
from condft.training.order import DataOrder, iter_micro_batches

__all__ = ["SelfDistillation"]


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
        self.settings, self._tokens, self._base, self._seed = settings, tokens, base, seed

    def micro_batches(self, step: int, accelerator: Accelerator) -> list[Tensor]:
        """This rank's texts in optimizer step `step` (from 1), one tensor a micro-batch; none where none is due."""
        turn, rest = divmod(step, self.settings.every)
        if rest:
            return []
        size, ranks = self.settings.per_device_batch_size, accelerator.num_processes
        batch = size * ranks * accelerator.gradient_accumulation_steps
        rows = iter_micro_batches(
            DataOrder(len(self._tokens), self._seed, batch),
            start_step=turn - 1,
            steps=turn,
            per_device_batch_size=size,
            rank=accelerator.process_index,
            num_ranks=ranks,
        )
        return [self._tokens[indices].to(accelerator.device) for indices in rows]

    def divergence(self, wrapped: nn.Module, model: nn.Module, tokens: Tensor) -> Tensor:
        """The mean divergence from the base along `tokens`, in nats a token: an fp32 scalar with a graph.

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
