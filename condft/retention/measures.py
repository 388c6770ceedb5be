"""What was forgotten, measured without any pre-training data: text cross-entropy, and KL to the base model."""

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

_LOG_SOFTMAX_ROWS = 256  # fp32 rows of the vocabulary held at once beside the model's own logits


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross entropy of text.

    Attributes:
        nats_per_token: Mean negative log-likelihood.
        num_tokens: Tokens it was taken over.
    """

    nats_per_token: float
    num_tokens: int


def held_out_text(source: str) -> str:
    """English text that fine-tuning has not seen.

    Args:
        source: `pydoc`: the help topics that come with Python (700 kB of prose on every machine; they differ a little
            between Python versions, and their markup stays). `wikitext`: the test split of WikiText-2 (raw), from the
            hub or its cache. Else the path of a UTF-8 text file.

    Raises:
        FileNotFoundError: Neither a known name nor a file.
        ConnectionError: WikiText is not cached and the hub does not answer.
        ValueError: The file is empty.
    """
    if source == "pydoc":
        from pydoc_data.topics import topics  # 700 kB: read when asked for

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
    from datasets import load_dataset  # slow to import: paid for only here

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (ConnectionError, OSError) as error:  # what datasets and huggingface_hub raise without a network
        raise ConnectionError(
            f"WikiText-2 is neither cached nor to be had from the hub ({error}); "
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
    """Cross entropy of the model on a text, in windows that do not overlap and lie evenly over the text.

    Args:
        model: A causal LM; called with `input_ids` alone.
        tokenizer: Its tokenizer; no special token is added.
        text: The text.
        max_tokens: About how many tokens to read: as many windows as fit in it, at least one.
        context_length: Tokens a window; its first is context only.
        batch_size: Windows a forward. The logits of a forward are batch_size · context_length · vocabulary numbers.
        progress: Show a bar.

    Raises:
        ValueError: The text has fewer than 2 tokens, or the result is not finite.
    """
    windows = text_windows(tokenizer, text, max_tokens=max_tokens, context_length=context_length)
    total = 0.0
    with measuring(model) as device:
        batches = windows.split(batch_size)
        for batch in tqdm(batches, desc="text cross-entropy", unit="batch", disable=not progress, leave=False):
            tokens = batch.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            for rows, wanted in zip(logits.split(_LOG_SOFTMAX_ROWS), targets.split(_LOG_SOFTMAX_ROWS), strict=True):
                total += F.cross_entropy(rows.float(), wanted, reduction="none").double().sum().item()
    count = windows.shape[0] * (windows.shape[1] - 1)
    return CrossEntropy(_finite(total / count, "the text cross-entropy"), count)


def text_windows(tokenizer: Any, text: str, *, max_tokens: int, context_length: int) -> Tensor:
    """Windows of a text's tokens: `(num_windows, context_length)`, long; shorter only where the whole text is.

    Raises:
        ValueError: The text has fewer than 2 tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"held-out text of {len(ids)} tokens: predicting one takes at least 2")
    length = min(context_length, len(ids))
    available = len(ids) // length
    wanted = min(available, max(1, max_tokens // length))
    starts = [index * available // wanted * length for index in range(wanted)]
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.long)


def kl_to_base(
    model: nn.Module,
    tokens: Tensor,
    base_context: Callable[[], AbstractContextManager[Any]],
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> float:
    """Mean KL(base ‖ adapted) per token, in nats, of the next-token distributions along `tokens`.

    Args:
        model: The adapted model.
        tokens: `(num_sequences, length)`, long, best from `sample_from_base`: then this estimates the KL divergence
            between the two models as distributions over text.
        base_context: Within it `model` is the base, e.g. `peft_model.disable_adapter`.
        batch_size: Sequences a forward; two sets of logits are held.
        progress: Show a bar.

    Raises:
        ValueError: Sequences of fewer than 2 tokens, or the result is not finite.
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
            for ours, theirs in zip(adapted.split(_LOG_SOFTMAX_ROWS), base.split(_LOG_SOFTMAX_ROWS), strict=True):
                ours_log, theirs_log = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
                total += F.kl_div(ours_log, theirs_log, reduction="none", log_target=True).double().sum().item()
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return _finite(total / count, "the KL divergence to the base")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}: the model's logits are not finite")
    return value
