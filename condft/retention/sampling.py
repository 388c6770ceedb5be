"""Text that a model itself writes: data where there is no pre-training data to be had."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from condft.runtime.model_mode import measuring

__all__ = ["sample_from_base"]


def sample_from_base(
    model: nn.Module,
    tokenizer: Any,
    *,
    num_sequences: int,
    num_tokens: int,
    seed: int,
    base_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = True,
) -> Tensor:
    """Text that the base model itself generates: ancestral sampling at temperature 1 from its start token.

    The draws come from a generator of their own (on the CPU, so devices agree as far as their logits do): the global
    random state is neither used nor moved.

    Args:
        model: A causal LM.
        tokenizer: Gives the start: BOS, or EOS, or a newline where it has neither. A `GenerationConfig` will do.
        num_sequences: How many.
        num_tokens: Tokens drawn for each. After an end of text the model goes on with the next one.
        seed: Of the generator.
        base_context: Within it `model` is the base, e.g. `peft_model.disable_adapter`.
        progress: Show a bar.

    Returns:
        `(num_sequences, start + num_tokens)`, long, on the CPU; the start is one token but for odd newlines.

    Raises:
        ValueError: Nothing to start from.
    """
    generator = torch.Generator().manual_seed(seed)
    start = _start_tokens(tokenizer)
    tokens = torch.tensor([start] * num_sequences, dtype=torch.long)
    with base_context(), measuring(model) as device:
        step, cache = tokens, None
        for _ in tqdm(range(num_tokens), desc="sampling base", unit="token", disable=not progress, leave=False):
            output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(dim=-1).cpu()
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
    return tokens


def _start_tokens(tokenizer: Any) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token[0] if isinstance(token, list) else token]  # a generation config may have several ends
    start: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"] if callable(tokenizer) else []
    if not start:
        raise ValueError(f"a {type(tokenizer).__name__} without BOS, EOS and newline: nothing to start sampling from")
    return start
