"""The loss agrees with the model's own over full logits, and asks for no more logits than answers need."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config

from condft.tasks.speech.features import PassThroughTower
from condft.training.objective import answer_loss_sum, count_answer_tokens

GPT2_CONFIG = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64)


def test_equals_the_models_own_loss(trainee: Any, data: Any) -> None:
    model, (examples, collate) = trainee().eval(), data
    batch = collate(examples)
    own = model(**batch).loss
    tokens = count_answer_tokens(batch["labels"])
    assert tokens == sum(len(example["answer"]) for example in examples)
    torch.testing.assert_close(answer_loss_sum(model, batch) / tokens, own, rtol=1e-5, atol=0)


def test_only_answer_positions_get_logits(trainee: Any, data: Any) -> None:
    model, (examples, collate) = trainee(), data
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, output: widths.append(output.shape[1]))
    answer_loss_sum(model, collate(examples))
    assert widths == [1 + max(len(example["answer"]) for example in examples)]


def test_answers_from_the_first_column_on(trainee: Any) -> None:
    """No left context for the first token: it does not count, the rest does."""
    tokens = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    model = trainee().eval()
    assert count_answer_tokens(tokens) == 10
    torch.testing.assert_close(answer_loss_sum(model, batch) / 10, model(**batch).loss, rtol=1e-5, atol=0)


def test_no_answer_is_an_error(trainee: Any) -> None:
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="batch of 2 examples has no answer token"):
        answer_loss_sum(trainee(), {"input_ids": tokens, "labels": torch.full_like(tokens, -100)})


@pytest.mark.parametrize("text_config", [GPT2_CONFIG, None], ids=["gpt2", "llama"])
def test_padding_shifts_no_position(audio_llm: Any, data: Any, text_config: Any) -> None:
    """GPT-2 looks its positions up in a table, so it matters where they begin; `generate` counts without padding."""
    model, (examples, collate) = audio_llm(text_config=text_config).eval(), data
    model.model.audio_tower = PassThroughTower()
    short, long = examples[0], examples[2]
    assert len(short["features"]) + len(short["answer"]) < len(long["features"]) + len(long["answer"])
    alone = sum(answer_loss_sum(model, collate([example])) for example in (short, long))
    torch.testing.assert_close(answer_loss_sum(model, collate([short, long])), alone, rtol=1e-5, atol=0)


def test_positions_of_the_batch_are_taken(audio_llm: Any, data: Any) -> None:
    model, (examples, collate) = audio_llm(text_config=GPT2_CONFIG).eval(), data
    model.model.audio_tower = PassThroughTower()
    batch = collate(examples[:1])
    shifted = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None] + 3}
    assert answer_loss_sum(model, shifted) != answer_loss_sum(model, batch)
