"""Examples become batches: the chat prompt around the audio, the answer after it, everything padded on the left.

The prompt is the same for all clips but for its number of `<sound>` tokens, so it is rendered and tokenized once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from condft.tasks.speech.data import Clip

IGNORE_INDEX = -100  # cross entropy passes over these labels


class SpeechExample(TypedDict):
    """One clip as the collator takes it; `features` is `(num_audio_tokens, tower_dim)`."""

    features: Tensor
    text: str
    language: str
    source: str


def make_examples(clips: Sequence[Clip], features: Sequence[Tensor]) -> list[SpeechExample]:
    """Pairs clips with their features (`compute_features`, same order) for a DataLoader with a collator."""
    return [
        {"features": tensor, "text": clip.text, "language": clip.language, "source": clip.source}
        for clip, tensor in zip(clips, features, strict=True)
    ]


@dataclass
class SpeechCollator:
    """Builds batches for an audio LLM that runs under `precomputed_features`.

    Attributes:
        processor: The model's processor: its chat template, tokenizer and audio token.
        prompt: What the user says after the audio.
        system_prompt: A system turn in front. None leaves it to the chat template, and some templates then put in
            a default one (SmolLM2's is some 20 tokens, paid for in every sequence).
        max_length: The language model's `max_position_embeddings`; longer sequences are refused, never cut.
    """

    processor: Any = field(repr=False)
    prompt: str = "Transcribe the speech."
    system_prompt: str | None = None
    max_length: int | None = None
    _prefix: list[int] = field(init=False, repr=False)
    _suffix: list[int] = field(init=False, repr=False)
    _control: set[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Renders and tokenizes the prompt.

        Raises:
            ValueError: The template does not show the audio exactly once, or the tokenizer lacks eos or padding.
        """
        tokenizer, audio_id = self.processor.tokenizer, self.processor.audio_token_id
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer needs an eos_token and a pad_token: answers end and batches are padded")
        ids = tokenizer(self._rendered_prompt(), add_special_tokens=False)["input_ids"]
        if ids.count(audio_id) != 1:
            token = self.processor.audio_token
            raise ValueError(f"the rendered prompt holds {token} {ids.count(audio_id)} times, it must be once")
        # Tokenized in one piece and split afterwards, so that the tokens are those of a user's own prompt.
        position = ids.index(audio_id)
        self._prefix, self._suffix = ids[:position], ids[position + 1 :]
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # An unknown character is no control token; tokenizers without a byte fallback write it as unk.
        self._control = (added | set(tokenizer.all_special_ids) | {audio_id}) - {tokenizer.unk_token_id}

    @classmethod
    def for_model(cls, model: nn.Module, processor: Any, **options: Any) -> "SpeechCollator":
        """A collator with `max_length` from the model's configuration; `options` are the other attributes."""
        config: Any = model.config
        length = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(processor, max_length=length, **options)

    def __call__(self, examples: Sequence[SpeechExample]) -> dict[str, Tensor]:
        """A training batch.

        Args:
            examples: At least one.

        Returns:
            `input_ids`, `attention_mask`, `labels` `(batch, length)` long, padded on the left, labels -100 but on
            the answer and its end-of-turn token; `input_features` `(batch, num_audio_tokens, tower_dim)` float32
            and `input_features_mask` `(batch, num_audio_tokens)` long, padded on the right with zeros.

        Raises:
            ValueError: A sequence longer than `max_length`, or a text that holds a control token.
        """
        answers = [self._answer_ids(example) for example in examples]
        for example, answer in zip(examples, answers, strict=True):
            _refuse(example, self._problem_of(example, answer))
        prompts = [self._prompt_ids(example) for example in examples]
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return {**self._batch(examples, sequences), "labels": _left_padded(labels, IGNORE_INDEX)}

    def prompts(self, examples: Sequence[SpeechExample]) -> dict[str, Tensor]:
        """A batch for `generate`: as a training batch, but without labels and ending where the answer begins."""
        sequences = [self._prompt_ids(example) for example in examples]
        for example, sequence in zip(examples, sequences, strict=True):
            _refuse(example, self._problem_of_length(example, len(sequence)))
        return self._batch(examples, sequences)

    def problem_of(self, example: SpeechExample) -> str | None:
        """Why no batch can hold the example, or None: its text has a control token, or it is too long."""
        return self._problem_of(example, self._answer_ids(example))

    def count_answer_tokens(self, example: SpeechExample) -> int:
        """How many tokens the example's text has, without the end-of-turn token."""
        return len(self._answer_ids(example)) - 1

    def _rendered_prompt(self) -> str:
        content = [{"type": "audio"}, {"type": "text", "text": self.prompt}]
        conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            conversation.insert(0, {"role": "system", "content": self.system_prompt})
        return self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    def _prompt_ids(self, example: SpeechExample) -> list[int]:
        return [*self._prefix, *[self.processor.audio_token_id] * len(example["features"]), *self._suffix]

    def _answer_ids(self, example: SpeechExample) -> list[int]:
        tokenizer = self.processor.tokenizer
        return [*tokenizer(example["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _problem_of(self, example: SpeechExample, answer: list[int]) -> str | None:
        if found := [token for token in answer[:-1] if token in self._control]:
            token = self.processor.tokenizer.decode(found[:1])
            return f"the text holds the control token {token!r}; take it out of the text"
        return self._problem_of_length(example, len(self._prompt_ids(example)) + len(answer))

    def _problem_of_length(self, example: SpeechExample, length: int) -> str | None:
        if self.max_length is None or length <= self.max_length:
            return None
        return (
            f"the sequence has {length} tokens ({len(example['features'])} of them audio), the language model takes "
            f"{self.max_length}; leave the clip out or shorten it"
        )

    def _batch(self, examples: Sequence[SpeechExample], sequences: list[list[int]]) -> dict[str, Tensor]:
        features = [example["features"] for example in examples]
        mask = [torch.ones(len(feature), dtype=torch.long) for feature in features]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": _left_padded(sequences, self.processor.tokenizer.pad_token_id),
            "attention_mask": _left_padded([[1] * len(sequence) for sequence in sequences], 0),
            "input_features": pad(features, batch_first=True),
            "input_features_mask": pad(mask, batch_first=True),
        }


def _refuse(example: SpeechExample, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{example['source']}: {problem}")


def _left_padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + row for row in rows], dtype=torch.long)
