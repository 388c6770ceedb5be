"""Batches: what is learned is the answer and nothing else, wherever padding and audio fall."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor

from condft.tasks.chat import IGNORED
from condft.tasks.speech import SpeechCollator, SpeechExample, precomputed_features

SpeechLLM = tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]
TOWER_DIM = 16


def example(text: str, num_features: int, seed: int = 0) -> SpeechExample:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_features, TOWER_DIM, generator=generator)
    return {"features": features, "text": text, "language": "en", "source": "m.jsonl:3"}


@pytest.fixture(scope="module")
def collator(speech_llm: SpeechLLM) -> SpeechCollator:
    return SpeechCollator.for_model(*speech_llm)


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: "<" not in text
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(any_text, st.integers(min_value=1, max_value=30)), min_size=1, max_size=5))
def test_labels_are_the_answers_and_all_counts_agree(
    collator: SpeechCollator, speech_llm: SpeechLLM, rows: list[tuple[str, int]]
) -> None:
    tokenizer, audio_id = speech_llm[1].tokenizer, speech_llm[1].audio_token_id
    batch = collator([example(text, length) for text, length in rows])
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.long,
        "attention_mask": torch.long,
        "labels": torch.long,
        "input_features": torch.float32,
        "input_features_mask": torch.long,
    }
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    assert batch["input_features"].shape == (*batch["input_features_mask"].shape, TOWER_DIM)
    for index, (text, length) in enumerate(rows):
        ids, mask, labels = (batch[key][index] for key in ("input_ids", "attention_mask", "labels"))
        assert mask.tolist() == sorted(mask.tolist())  # zeros, then ones: padded on the left
        answer = labels[labels != IGNORED]
        assert torch.equal(labels[-len(answer) :], answer)  # in one piece, at the right edge
        assert torch.equal(ids[-len(answer) :], answer)
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == text
        assert (ids == audio_id).sum() == length == batch["input_features_mask"][index].sum()
        assert batch["input_features_mask"][index, :length].all()
        assert not batch["input_features"][index, length:].any()


def test_the_sequence_is_the_chat_template_s_own(collator: SpeechCollator, speech_llm: SpeechLLM) -> None:
    tokenizer = speech_llm[1].tokenizer
    (ids,) = collator([example("one two", 3)])["input_ids"]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<sound><sound><sound>Transcribe the speech."
        "<|im_end|>\n<|im_start|>assistant\none two<|im_end|>"
    )
    assert tokenizer.decode(ids) == expected
    assert ids.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_a_system_prompt_replaces_the_template_s_own(speech_llm: SpeechLLM) -> None:
    collator = SpeechCollator.for_model(*speech_llm, prompt="Write.", system_prompt="Hear.")
    (ids,) = collator.prompts([example("one", 1)])["input_ids"]
    assert speech_llm[1].tokenizer.decode(ids) == (
        "<|im_start|>system\nHear.<|im_end|>\n<|im_start|>user\n<sound>Write.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_batch_is_the_training_batch_without_answers(collator: SpeechCollator) -> None:
    examples = [example("one two", 4), example("two one", 9)]  # answers of one length
    training, prompts = collator(examples), collator.prompts(examples)
    answer_length = int((training["labels"][0] != IGNORED).sum())
    assert prompts.keys() == training.keys() - {"labels"}
    assert torch.equal(prompts["input_ids"], training["input_ids"][:, :-answer_length])
    assert torch.equal(prompts["attention_mask"], training["attention_mask"][:, :-answer_length])
    assert torch.equal(prompts["input_features"], training["input_features"])


def test_neither_padding_nor_neighbours_change_a_clip_s_logits(
    collator: SpeechCollator, speech_llm: SpeechLLM
) -> None:
    model, _ = speech_llm
    short, long = example("one", 3, seed=1), example("one two three", 20, seed=2)
    with torch.no_grad(), precomputed_features(model):
        alone = model(**collator([short])).logits[0]
        padded = model(**collator([short, long])).logits[0]
    torch.testing.assert_close(padded[-len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_logits_to_keep_covers_the_answers(collator: SpeechCollator, speech_llm: SpeechLLM) -> None:
    """What the trainer relies on: the last A + 1 logits predict every label of a left-padded batch."""
    model, _ = speech_llm
    batch = collator([example("one", 3, seed=1), example("one two three", 20, seed=2)])
    labels = batch["labels"]
    longest = int((labels != IGNORED).sum(dim=1).max())
    with torch.no_grad(), precomputed_features(model):
        loss = model(**batch).loss
        del batch["labels"]
        logits = model(**batch, logits_to_keep=longest + 1).logits
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -longest:].flatten())
    torch.testing.assert_close(own, loss)


def test_a_sequence_too_long_for_the_language_model_is_named(collator: SpeechCollator) -> None:
    with pytest.raises(
        ValueError, match=r"m\.jsonl:3: the sequence has \d+ tokens \(200 of them audio\).* takes at most 256"
    ):
        collator([example("one", 3), example("one", 200)])


@pytest.mark.parametrize("token", ["<sound>", "<|im_end|>"])
def test_control_tokens_in_a_text_are_refused(collator: SpeechCollator, token: str) -> None:
    with pytest.raises(ValueError, match=r"m\.jsonl:3: the text holds the control token '<.*>'"):
        collator([example(f"one {token} two", 2)])


def test_a_template_that_drops_or_doubles_the_audio_is_refused(speech_llm: SpeechLLM) -> None:
    with pytest.raises(ValueError, match="holds <sound> 2 times"):
        SpeechCollator(speech_llm[1], prompt="What is <sound>?")
    deaf: Any = copy.deepcopy(speech_llm[1])
    deaf.chat_template = "{{ 'hello' }}"
    with pytest.raises(ValueError, match="holds <sound> 0 times"):
        SpeechCollator(deaf)


def test_a_tokenizer_without_end_of_turn_is_refused(speech_llm: SpeechLLM) -> None:
    processor: Any = copy.deepcopy(speech_llm[1])
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs an eos_token"):
        SpeechCollator(processor)
