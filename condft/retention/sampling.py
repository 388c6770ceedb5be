"""Text sampled from the base model: it replaces the pre-training data, which is not available."""

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
    """Text sampled from the base model: ancestral sampling at temperature 1, from its start token on.

    Each token is drawn from the model's full distribution, without top-k or top-p, so that the texts are samples of
    what the model knows. The draws use a generator of their own, on the CPU: the same seed gives the same texts on
    every device whose logits agree, and the global random state is neither read nor changed.

    Args:
        model: A causal LM.
        tokenizer: Defines the start: BOS, else EOS, else a newline. A `GenerationConfig` works too.
        num_sequences: Number of texts.
        num_tokens: Tokens drawn for each text. After an end-of-text token the model goes on with the next text.
        seed: Seed of the generator.
        base_context: Makes a context in which `model` is the base, such as `peft_model.disable_adapter`.
        progress: Show a progress bar.

    Returns:
        `(num_sequences, start + num_tokens)`, long, on the CPU. `start` is 1, except for a newline of
        several tokens.

    Raises:
        ValueError: The tokenizer has no BOS, no EOS and no newline.

    >>> texts = sample_from_base(base, tokenizer, num_sequences=2, num_tokens=8, seed=0, progress=False)
    >>> texts.shape
    torch.Size([2, 9])
    >>> tokenizer.convert_ids_to_tokens(texts[:, 0])
    ['<s>', '<s>']
    """
    generator = torch.Generator().manual_seed(seed)
    start = _start_tokens(tokenizer)
    tokens = torch.tensor([start] * num_sequences, dtype=torch.long)
    with base_context(), measuring(model) as device:
        # After the first pass, a step is the drawn token alone: the cache holds what came before it.
        step, cache = tokens, None
        for _ in tqdm(range(num_tokens), desc="sampling base", unit="token", disable=not progress, leave=False):
            output = model(input_ids=step.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].float().softmax(dim=-1).cpu()
            # on the CPU: a CUDA generator draws other numbers from the same seed
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
    return tokens


def _start_tokens(tokenizer: Any) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token[0] if isinstance(token, list) else token]  # a GenerationConfig may list several end tokens
    start: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"] if callable(tokenizer) else []
    if not start:
        raise ValueError(
            f"a {type(tokenizer).__name__} without BOS, EOS and newline: sampling has no token to start from"
        )
    return start
