"""Self-distillation: the KL divergence to the base model, on text sampled from it, as one term of the loss.

The base is the teacher, the model in training is the student. Both are the same model: within `disable_adapter` it is
the base, so there is no second model in memory. The sampled text replaces the pre-training data.
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
    """Self-distillation: KL(base ‖ adapted), on text sampled from the base, is added to the loss of some steps.

    It needs no pre-training data.

    >>> SelfDistillationConfig(weight=3.0)
    SelfDistillationConfig(weight=3.0, every=2, per_device_batch_size=4, num_sequences=128, num_tokens=64)
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    weight: float = Field(default=10.0, gt=0, description="Factor of the KL, which is in nats per token, in the loss.")
    every: int = Field(default=2, ge=1, description="The KL is added in every n-th optimizer step.")
    per_device_batch_size: int = Field(default=4, ge=1, description="Sampled texts on one device in one forward pass.")
    num_sequences: int = Field(default=128, ge=1, description="Texts sampled from the base before training.")
    num_tokens: int = Field(default=64, ge=1, description="Tokens sampled for each text.")


class SelfDistillation:
    r"""Adds $\lambda\,\mathrm{KL}(p_\text{base} \,\|\, p_\text{adapted})$ to the loss of every n-th optimizer step.

    The KL is the mean over the next-token distributions along the texts, in nats per token. So λ does not depend on
    how much text a step reads.

    Args:
        settings: Weight, interval and batch size. `num_sequences` and `num_tokens` are not used here: they say how
            much text to sample.
        tokens: `(num_sequences, length)`, long, from `sample_from_base`; the same in every process.
        base_context: Makes a context in which the trained model is the base: `peft_model.disable_adapter`.
        seed: Seed of the order in which the texts are read.

    Raises:
        ValueError: The sequences have fewer than 2 tokens.

    In a training loop of your own, the KL is one more term of the loss:

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig
    >>> from condft.retention import sample_from_base
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=3))
    >>> with model.disable_adapter():
    ...     texts = sample_from_base(model, tokenizer, num_sequences=8, num_tokens=16, seed=0, progress=False)
    >>> distillation = SelfDistillation(SelfDistillationConfig(), texts, model.disable_adapter, seed=0)
    >>> loss = model(input_ids=token_ids, labels=token_ids).loss
    >>> loss = loss + distillation.settings.weight * distillation.kl_to_base(model, model, texts[:4])
    >>> loss.backward()
    """

    def __init__(
        self,
        settings: SelfDistillationConfig,
        tokens: Tensor,
        base_context: Callable[[], AbstractContextManager[Any]],
        *,
        seed: int,
    ) -> None:
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: needs at least one sequence of at least 2")
        self.settings, self.tokens, self.seed, self._base_context = settings, tokens, seed, base_context

    def kl_to_base(self, wrapped: nn.Module, model: nn.Module, tokens: Tensor) -> Tensor:
        """The mean KL(base ‖ adapted) along `tokens`, in nats per token.

        Args:
            wrapped: The model as it trains: wrapped by DDP or DeepSpeed, or the model itself.
            model: The PEFT model inside, which `base_context` belongs to.
            tokens: `(batch, length)`, long, on the model's device.

        Returns:
            fp32 scalar. Its gradient reaches the trained parameters through the student; the teacher has no gradient.
        """
        inputs = tokens[:, :-1]
        # The student comes first: FSDP2 reads which parameters train at the first forward pass of the run, and within
        # `disable_adapter` none of them does.
        adapted = wrapped(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)
        # Eval mode (`measuring`): a teacher with dropout would contradict itself. `flags_kept`: PEFT changes
        # `requires_grad` when it turns adapters off and on.
        with measuring(model), flags_kept(model), self._base_context():
            target = model(input_ids=inputs, use_cache=False).logits.float().log_softmax(-1)
        # torch's reduction "batchmean" would divide by the number of texts, not of tokens.
        return F.kl_div(adapted, target, reduction="sum", log_target=True) / inputs.numel()
