"""Batches of speech examples: the chat prompt around the audio, the answer after it, padded on the left.

The prompts of all clips differ only in their number of `<sound>` tokens, so the prompt is rendered and tokenized once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from condft.tasks.chat import IGNORED, conversation, pad_left
from condft.tasks.speech.clips import Clip

__all__ = ["SpeechCollator", "SpeechExample", "make_examples"]


class SpeechExample(TypedDict):
    """One clip as the collator takes it. `features` is `(num_audio_tokens, tower_dim)`, fp32.

    >>> features = torch.zeros(10, 16)
    >>> example = SpeechExample(features=features, text="four two", language="en", source="manifest.jsonl:3")
    >>> example["text"]
    'four two'
    """

    features: Tensor
    text: str
    language: str
    source: str


def make_examples(clips: Sequence[Clip], features: Sequence[Tensor]) -> list[SpeechExample]:
    """Examples of clips and their features, in the order given.

    Args:
        clips: Clips of `load_manifest` or `load_speech_dataset`.
        features: What `compute_features` returned for them.

    >>> from condft.tasks.speech import load_manifest
    >>> clips = load_manifest("clips/manifest.jsonl").clips
    >>> examples = make_examples(clips, [torch.zeros(10, 16)] * len(clips))
    >>> examples[1]["text"], examples[1]["language"]
    ('one two', 'de')
    """
    return [
        {"features": tensor, "text": clip.text, "language": clip.language, "source": clip.source}
        for clip, tensor in zip(clips, features, strict=True)
    ]


@dataclass
class SpeechCollator:
    """Makes batches for an audio LLM within `precomputed_features`.

    Attributes:
        processor: The model's processor. Its chat template, tokenizer and audio token are used.
        prompt: The user's text after the audio.
        system_prompt: Text of a system turn before it. None leaves it to the chat template. Some templates then add
            a default one (SmolLM2's has some 20 tokens, which every sequence pays for).
        max_length: The language model's `max_position_embeddings`, in tokens. Longer sequences are refused, not cut.

    >>> from condft.tasks.speech import compose_audio_llm, compute_features, load_manifest, make_examples
    >>> model, processor = compose_audio_llm("whisper", "llama", max_seconds=2)
    >>> clips = load_manifest("clips/manifest.jsonl").clips
    >>> examples = make_examples(clips, compute_features(model, processor, clips, progress=False))
    >>> collator = SpeechCollator.for_model(model, processor, prompt="Transcribe.")
    >>> sorted(collator(examples))
    ['attention_mask', 'input_features', 'input_features_mask', 'input_ids', 'labels']
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
            ValueError: The rendered prompt does not hold the audio exactly once, or the tokenizer has no eos or pad
                token.
        """
        tokenizer, audio_id = self.processor.tokenizer, self.processor.audio_token_id
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer needs an eos_token, which ends answers, and a pad_token")
        ids = tokenizer(self._rendered_prompt(), add_special_tokens=False)["input_ids"]
        if ids.count(audio_id) != 1:
            token = self.processor.audio_token
            raise ValueError(f"the rendered prompt holds {token} {ids.count(audio_id)} times, it must hold it once")
        # Tokenized as a whole and split afterwards: the parts by themselves could be other tokens at the split.
        position = ids.index(audio_id)
        self._prefix, self._suffix = ids[:position], ids[position + 1 :]
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # unk is allowed in a text: tokenizers without a byte fallback write an unknown character as unk.
        self._control = (added | set(tokenizer.all_special_ids) | {audio_id}) - {tokenizer.unk_token_id}

    @classmethod
    def for_model(cls, model: nn.Module, processor: Any, **options: Any) -> "SpeechCollator":
        """A collator with `max_length` from the model's configuration. `options` are the other attributes."""
        config: Any = model.config
        length = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(processor, max_length=length, **options)

    def __call__(self, examples: Sequence[SpeechExample]) -> dict[str, Tensor]:
        """A training batch.

        Args:
            examples: At least one.

        Returns:
            `input_ids`, `attention_mask` and `labels`: `(batch, length)`, long, padded on the left. Labels are -100
            except for the answer and its end-of-turn token. `input_features`: `(batch, num_audio_tokens, tower_dim)`,
            fp32, and `input_features_mask`: `(batch, num_audio_tokens)`, long; both padded on the right with zeros.

        Raises:
            ValueError: A sequence is longer than `max_length`, or a text holds a control token.
        """
        answers = [self._answer_ids(example) for example in examples]
        for example, answer in zip(examples, answers, strict=True):
            _refuse(example, self._problem_of(example, answer))
        prompts = [self._prompt_ids(example) for example in examples]
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return {**self._batch(examples, sequences), "labels": pad_left(labels, IGNORED)}

    def prompts(self, examples: Sequence[SpeechExample]) -> dict[str, Tensor]:
        """A batch for `generate`: like a training batch, but without labels, and it ends where the answer begins."""
        sequences = [self._prompt_ids(example) for example in examples]
        for example, sequence in zip(examples, sequences, strict=True):
            _refuse(example, self._problem_of_length(example, len(sequence)))
        return self._batch(examples, sequences)

    def problem_of(self, example: SpeechExample) -> str | None:
        """Why the example cannot be used: its text holds a control token, or it is too long. None if it can."""
        return self._problem_of(example, self._answer_ids(example))

    def count_answer_tokens(self, example: SpeechExample) -> int:
        """Number of tokens of the example's text, without the end-of-turn token."""
        return len(self._answer_ids(example)) - 1

    def _rendered_prompt(self) -> str:
        messages = conversation([{"type": "audio"}, {"type": "text", "text": self.prompt}], self.system_prompt)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _prompt_ids(self, example: SpeechExample) -> list[int]:
        return [*self._prefix, *[self.processor.audio_token_id] * len(example["features"]), *self._suffix]

    def _answer_ids(self, example: SpeechExample) -> list[int]:
        tokenizer = self.processor.tokenizer
        return [*tokenizer(example["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _problem_of(self, example: SpeechExample, answer: list[int]) -> str | None:
        # Such a token in a text would end the answer early, or would be one <sound> more than there are features.
        if found := [token for token in answer[:-1] if token in self._control]:
            token = self.processor.tokenizer.decode(found[:1])
            return f"the text holds the control token {token!r}; remove it from the text"
        return self._problem_of_length(example, len(self._prompt_ids(example)) + len(answer))

    def _problem_of_length(self, example: SpeechExample, length: int) -> str | None:
        if self.max_length is None or length <= self.max_length:
            return None
        return (
            f"the sequence has {length} tokens ({len(example['features'])} of them audio), the language model takes "
            f"at most {self.max_length}; leave the clip out or shorten it"
        )

    def _batch(self, examples: Sequence[SpeechExample], sequences: list[list[int]]) -> dict[str, Tensor]:
        features = [example["features"] for example in examples]
        mask = [torch.ones(len(feature), dtype=torch.long) for feature in features]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad_left(sequences, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_left([[1] * len(sequence) for sequence in sequences], 0),
            "input_features": pad(features, batch_first=True),
            "input_features_mask": pad(mask, batch_first=True),
        }


def _refuse(example: SpeechExample, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{example['source']}: {problem}")
