"""What was learned: transcription by greedy decoding, and its word error rate, overall and by language."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from torch import nn
from tqdm.auto import tqdm

from condft.runtime.model_mode import measuring

_JOINING = "'’ʼ"  # inside a word: "don't" is one word, not two


@dataclass(frozen=True)
class WerReport:
    """Word error rates: edits over reference words of a whole corpus (can exceed 1 when words are invented).

    Attributes:
        overall: Over all clips.
        by_language: Over each language's clips, languages in sorted order.
        num_clips: How many clips.
        num_words: Words in the references.
        substitutions: Words put for others.
        deletions: Reference words left out.
        insertions: Words invented.
    """

    overall: float
    by_language: dict[str, float]
    num_clips: int
    num_words: int
    substitutions: int
    deletions: int
    insertions: int


def normalize(text: str) -> str:
    """Lower case, NFKC, without punctuation, words one space apart. Letters stay as they are: ß is not ss."""
    kept = []
    for character in unicodedata.normalize("NFKC", text).lower():
        if character in _JOINING:
            continue
        kept.append(" " if unicodedata.category(character).startswith("P") else character)
    return " ".join("".join(kept).split())


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str] | None = None
) -> WerReport:
    """The corpus-level word error rate of normalized texts: total edits over total reference words.

    Args:
        references: What was said, one text a clip.
        hypotheses: What was heard; may be empty texts.
        languages: Each clip's language; None leaves `by_language` empty.

    Raises:
        ValueError: Lengths differ, there are no clips, or a reference has no word.
    """
    if not len(references) == len(hypotheses) == len(languages if languages is not None else references):
        raise ValueError(
            f"{len(references)} references, {len(hypotheses)} hypotheses and "
            f"{'no' if languages is None else len(languages)} languages do not match one another"
        )
    if not references:
        raise ValueError("no clips to compare: the test split is empty")
    truths, heard = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    for index, (raw, truth) in enumerate(zip(references, truths, strict=True)):
        if not truth:
            raise ValueError(f"reference {index} ({raw!r}) has no word to compare with; remove the clip")
    whole = jiwer.process_words(truths, heard)
    by_language = {}
    for language in sorted(set(languages or ())):
        at = [index for index, name in enumerate(languages or ()) if name == language]
        by_language[language] = float(jiwer.wer([truths[i] for i in at], [heard[i] for i in at]))
    return WerReport(
        overall=float(whole.wer),
        by_language=by_language,
        num_clips=len(truths),
        num_words=whole.hits + whole.substitutions + whole.deletions,
        substitutions=whole.substitutions,
        deletions=whole.deletions,
        insertions=whole.insertions,
    )


def transcribe(
    model: nn.Module,
    tokenizer: Any,
    prompt_batches: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    progress: bool = True,
) -> list[str]:
    """Greedy transcriptions of prompt batches. The processes share the batches, and each gets the texts of all.

    Args:
        model: Unwrapped (not DDP), with `generate`; in whatever mode, which it has again afterwards.
        tokenizer: A tokenizer or processor with `batch_decode`.
        prompt_batches: `input_ids` (B, T; left-padded), `attention_mask`, and the audio's inputs; what is not a tensor
            is left out.
        max_new_tokens: Longest answer.
        progress: Show a bar (main process only).

    Returns:
        One text a clip, in order, special tokens and outer blanks removed.

    Raises:
        ValueError: `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
    state = PartialState()
    own = range(state.process_index, len(prompt_batches), state.num_processes)
    hidden = not (progress and state.is_main_process)
    texts: list[tuple[int, list[str]]] = []
    with measuring(model) as device:
        for index in tqdm(own, desc="transcribing", unit="batch", disable=hidden, leave=False):
            tensors = {k: v for k, v in prompt_batches[index].items() if isinstance(v, torch.Tensor)}
            texts.append((index, _generate(model, tokenizer, send_to_device(tensors, device), max_new_tokens)))
    return [text for _, batch in sorted(gather_object(texts)) for text in batch]


def _generate(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    pad = getattr(tokenizer, "tokenizer", tokenizer).pad_token_id
    # the sampling settings of a chat model's generation_config are unset: under greedy search they only warn
    tokens = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    answers = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
