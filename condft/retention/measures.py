"""How much a model has forgotten, without any pre-training data: cross entropy of text, and KL to the base model."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from condft.runtime.model_mode import measuring

# The logits are in the model's dtype. They become fp32 in slices of this many positions, because an fp32 copy of all
# logits (batch x context x vocabulary) would double the peak memory.
_FP32_ROWS = 256


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy of a model on a text.

    Attributes:
        nats_per_token: Mean negative log-likelihood of a token, in nats; `exp` of it is the perplexity.
        num_tokens: Number of predicted tokens that the mean is taken over.

    >>> before, after = CrossEntropy(2.5, 12_000), CrossEntropy(2.75, 12_000)
    >>> after.nats_per_token - before.nats_per_token  # what was forgotten
    0.25
    """

    nats_per_token: float
    num_tokens: int


def held_out_text(source: str) -> str:
    """Text that fine-tuning has not seen, to measure forgetting on.

    Args:
        source: One of

            - `pydoc`: the help topics that come with Python: 700 kB of English prose on every machine, without a
              download. They differ a little between Python versions, and their markup is kept.
            - `wikitext`: the test split of WikiText-2 (raw), from the hub or its cache. Needs the package `datasets`.
            - the path of a UTF-8 text file.

    Raises:
        FileNotFoundError: `source` is neither a known name nor a file.
        ConnectionError: WikiText-2 is not cached and the hub does not answer.
        ModuleNotFoundError: WikiText-2 without the package `datasets`.
        ValueError: The file is empty.

    >>> text = held_out_text("pydoc")
    >>> len(text) > 400_000
    True
    """
    if source == "pydoc":
        from pydoc_data.topics import topics  # 700 kB: imported only where it is used

        return "\n\n".join(topics[name] for name in sorted(topics))
    if source == "wikitext":
        return _wikitext()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"held-out text {source!r} is no file and none of: pydoc, wikitext")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"held-out text {path} is empty")
    return text


def _wikitext() -> str:
    try:
        from datasets import load_dataset  # no core dependency, and slow to import
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "held-out text 'wikitext' needs the package datasets: pip install datasets, or use 'pydoc' or the path of "
            "a text file"
        ) from error
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (ConnectionError, OSError) as error:  # what datasets and huggingface_hub raise without a network
        raise ConnectionError(
            f"WikiText-2 is not cached, and the hub does not answer ({error}); "
            "use evaluation.text: pydoc, or the path of a text file"
        ) from error
    return "".join(rows["text"])


def text_cross_entropy(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    max_tokens: int,
    context_length: int,
    batch_size: int = 4,
    progress: bool = True,
) -> CrossEntropy:
    """Mean cross entropy of the model on a text.

    The text is read in windows of `context_length` tokens that do not overlap. Where it is longer than `max_tokens`,
    the windows are spread evenly over it. The modes (train or eval) of the model's modules are restored afterwards.

    Args:
        model: A causal LM. It is called with `input_ids` alone.
        tokenizer: Its tokenizer. No special token is added.
        text: The text.
        max_tokens: About how many tokens to read: as many whole windows as fit into it, at least one.
        context_length: Tokens of a window. The first one is context only, it is not predicted.
        batch_size: Windows of a forward pass, whose logits are batch_size x context_length x vocabulary numbers.
        progress: Show a progress bar.

    Raises:
        ValueError: The text has fewer than 2 tokens, or the result is not finite.

    >>> text = "the quick brown fox jumps over the lazy dog. " * 20
    >>> result = text_cross_entropy(base, tokenizer, text, max_tokens=256, context_length=64, progress=False)
    >>> result.num_tokens  # 4 windows, each of which predicts 63 tokens
    252
    >>> 4.4 < result.nats_per_token < 4.8  # random weights: about log(96), the size of the vocabulary
    True
    """
    windows = text_windows(tokenizer, text, max_tokens=max_tokens, context_length=context_length)
    total = 0.0
    with measuring(model) as device:
        batches = windows.split(batch_size)
        for batch in tqdm(batches, desc="text cross-entropy", unit="batch", disable=not progress, leave=False):
            tokens = batch.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            for rows, expected in zip(logits.split(_FP32_ROWS), targets.split(_FP32_ROWS), strict=True):
                # in fp64: forgetting is a small difference of two such means, and a long fp32 sum rounds
                total += F.cross_entropy(rows.float(), expected, reduction="none").double().sum().item()
    count = windows.shape[0] * (windows.shape[1] - 1)
    return CrossEntropy(_finite(total / count, "the text cross-entropy"), count)


def text_windows(tokenizer: Any, text: str, *, max_tokens: int, context_length: int) -> Tensor:
    """Windows of a text's tokens that do not overlap, spread evenly over the text.

    Returns:
        `(num_windows, context_length)`, long; one row of fewer tokens where the whole text is shorter than a window.

    Raises:
        ValueError: The text has fewer than 2 tokens.
    """
    # verbose=False: transformers would warn that the text is longer than the model's context; its windows are not.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"held-out text of {len(ids)} tokens: predicting one takes at least 2")
    length = min(context_length, len(ids))
    available = len(ids) // length
    count = min(available, max(1, max_tokens // length))
    # In whole windows, so that none overlaps another and none is cut.
    starts = [index * available // count * length for index in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.long)


def kl_to_base(
    model: nn.Module,
    tokens: Tensor,
    base_context: Callable[[], AbstractContextManager[Any]],
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> float:
    """Mean KL(base ‖ adapted) of the next-token distributions along `tokens`, in nats per token.

    0 where both models predict the same. On text sampled from the base it estimates the KL divergence between the two
    models as distributions over text, divided by the length: how far training has moved the model from what it was,
    measured where the base itself would write.

    Args:
        model: The adapted model.
        tokens: `(num_sequences, length)`, long, best from `sample_from_base`.
        base_context: Makes a context in which `model` is the base, such as `peft_model.disable_adapter`.
        batch_size: Sequences of a forward pass. The logits of two models are held at the same time.
        progress: Show a progress bar.

    Raises:
        ValueError: The sequences have fewer than 2 tokens, or the result is not finite.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig
    >>> from condft.retention import sample_from_base
    >>> texts = sample_from_base(base, tokenizer, num_sequences=4, num_tokens=16, seed=0, progress=False)
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=3))
    >>> kl_to_base(model, texts, model.disable_adapter, progress=False)  # nothing has trained yet
    0.0
    >>> for parameter in model.parameters():
    ...     if parameter.requires_grad:
    ...         parameter.data *= 2  # as if it had trained
    >>> kl_to_base(model, texts, model.disable_adapter, progress=False) > 0
    True
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: needs at least one sequence of at least 2")
    total = 0.0
    with measuring(model) as device:
        batches = tokens.split(batch_size)
        for batch in tqdm(batches, desc="KL to base", unit="batch", disable=not progress, leave=False):
            inputs = batch[:, :-1].to(device)
            adapted = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            with base_context():
                base = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            for rows, base_rows in zip(adapted.split(_FP32_ROWS), base.split(_FP32_ROWS), strict=True):
                log_p, base_log_p = rows.float().log_softmax(-1), base_rows.float().log_softmax(-1)
                # kl_div(input, target) is KL(target ‖ input): the expectation is over the base's predictions
                total += F.kl_div(log_p, base_log_p, reduction="none", log_target=True).double().sum().item()
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return _finite(total / count, "the KL divergence to the base")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}: the model's logits are not finite")
    return value
