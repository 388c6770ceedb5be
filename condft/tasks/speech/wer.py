"""Transcription by greedy decoding, and its word error rate: overall and for each language."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from condft.runtime.model_mode import measuring
from condft.runtime.process_group import ProcessGroup

__all__ = ["WerReport", "normalize", "transcribe", "word_error_rate"]

_APOSTROPHES = "'’ʼ"  # removed, not replaced by a blank: "don't" is one word, not two


@dataclass(frozen=True)
class WerReport:
    """Word error rates of a corpus: the edits of all clips, divided by the reference words of all clips.

    A rate is 0 for perfect transcriptions, and above 1 if many words are inserted.

    Attributes:
        overall: Rate over all clips.
        by_language: Rate over the clips of each language, in sorted order.
        num_clips: Number of clips.
        num_words: Number of words in the references.
        substitutions: Reference words replaced by other words.
        deletions: Reference words missing in the hypotheses.
        insertions: Hypothesis words that the references do not have.

    >>> report = word_error_rate(["one two"], ["one three four"])
    >>> report.num_words, report.substitutions, report.deletions, report.insertions
    (2, 1, 0, 1)
    """

    overall: float
    by_language: dict[str, float]
    num_clips: int
    num_words: int
    substitutions: int
    deletions: int
    insertions: int


def normalize(text: str) -> str:
    """A text as it is compared: NFKC, lower case, without punctuation, one space between words.

    Letters are kept as they are: ß does not become ss.

    >>> normalize("Don't say:  FOUR-two!")
    'dont say four two'
    """
    kept = []
    for character in unicodedata.normalize("NFKC", text).lower():
        if character in _APOSTROPHES:
            continue
        kept.append(" " if unicodedata.category(character).startswith("P") else character)
    return " ".join("".join(kept).split())


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str] | None = None
) -> WerReport:
    """The word error rate of a corpus, on normalized texts: all edits divided by all reference words.

    Args:
        references: The correct text of each clip.
        hypotheses: The transcription of each clip; may be empty.
        languages: The language of each clip; None leaves `by_language` empty.

    Raises:
        ValueError: The lengths differ, there are no clips, or a reference has no word.

    >>> report = word_error_rate(["One two.", "eins zwei drei"], ["one two", "eins drei"], ["en", "de"])
    >>> report.overall, report.by_language
    (0.2, {'de': 0.3333333333333333, 'en': 0.0})
    """
    if not len(references) == len(hypotheses) == len(languages if languages is not None else references):
        raise ValueError(
            f"{len(references)} references, {len(hypotheses)} hypotheses and "
            f"{'no' if languages is None else len(languages)} languages do not match"
        )
    if not references:
        raise ValueError("no clips to compare: the test split is empty")
    expected, found = [normalize(text) for text in references], [normalize(text) for text in hypotheses]
    for index, (raw, text) in enumerate(zip(references, expected, strict=True)):
        if not text:
            raise ValueError(f"reference {index} ({raw!r}) has no word to compare with; remove the clip")
    whole = jiwer.process_words(expected, found)
    by_language = {}
    for language in sorted(set(languages or ())):
        at = [index for index, name in enumerate(languages or ()) if name == language]
        by_language[language] = float(jiwer.wer([expected[i] for i in at], [found[i] for i in at]))
    return WerReport(
        overall=float(whole.wer),
        by_language=by_language,
        num_clips=len(expected),
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
    """Greedy transcriptions of prompt batches. The processes share the batches, and each returns the texts of all.

    Args:
        model: A model with `generate`, not wrapped by DDP. The modes of its modules are restored afterwards.
        tokenizer: A tokenizer or processor with `batch_decode`.
        prompt_batches: From `SpeechCollator.prompts`: `input_ids` `(batch, length)`, padded on the left,
            `attention_mask`, and the inputs of the audio. Values that are not tensors are ignored.
        max_new_tokens: Longest transcription, in tokens.
        progress: Show a progress bar (in the first process only).

    Returns:
        One text for each clip, in order, without special tokens and outer blanks.

    Raises:
        ValueError: `max_new_tokens` is less than 1.

    >>> prompts = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    >>> texts = transcribe(base, tokenizer, [prompts], max_new_tokens=4, progress=False)
    >>> len(texts)  # one for each row of the batch
    2
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
    group = ProcessGroup()

    def transcribe_share() -> list[tuple[int, list[str]]]:
        # Every n-th batch: batches are often sorted by length, and the shares then take about the same time.
        share = range(group.rank, len(prompt_batches), group.size)
        texts: list[tuple[int, list[str]]] = []
        hidden = not (progress and group.first)
        with measuring(model) as device:
            for index in tqdm(share, desc="transcribing", unit="batch", disable=hidden, leave=False):
                tensors = {k: v for k, v in prompt_batches[index].items() if isinstance(v, torch.Tensor)}
                texts.append((index, _generate(model, tokenizer, send_to_device(tensors, device), max_new_tokens)))
        return texts

    by_index = dict(pair for share in group.run(transcribe_share) for pair in share)
    return [text for index in sorted(by_index) for text in by_index[index]]


def _generate(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    pad = getattr(tokenizer, "tokenizer", tokenizer).pad_token_id
    # Sampling settings of a chat model's generation_config are unset: with do_sample=False, transformers 5 warns of
    # each of them at every call.
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
