"""A model's own text: seeded, by the model's own law, of the base, from its start."""

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from condft import CondFTConfig
from condft.retention.sampling import sample_from_base


def test_samples_are_seeded_and_leave_the_global_state_alone(tiny_llama: Any, tokenizer: Any) -> None:
    model, state = tiny_llama(), torch.get_rng_state()
    first, again, other = (
        sample_from_base(model, tokenizer, num_sequences=3, num_tokens=8, seed=seed, progress=False)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 9)
    assert first.dtype == torch.long
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_samples_follow_the_models_distribution(tiny_llama: Any, tokenizer: Any) -> None:
    """The mean -log p of a model's own samples is its entropy: both estimated, on the second token given the first."""
    model = tiny_llama(2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that a wrong law would show
        tokens = sample_from_base(model, tokenizer, num_sequences=4000, num_tokens=2, seed=0, progress=False)
        log_probabilities = model(input_ids=tokens[:, :2]).logits[:, 1].log_softmax(-1)
    drawn = -log_probabilities.gather(1, tokens[:, 2:]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    assert entropy < 0.95 * math.log(96)
    assert abs(drawn.mean() - entropy) < 4 * drawn.std() / math.sqrt(len(drawn))


def test_samples_come_from_the_base_not_from_the_adapted(tiny_llama: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"num_sequences": 2, "num_tokens": 12, "seed": 0, "progress": False}
    expected = sample_from_base(tiny_llama(), tokenizer, **options)
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=9))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(5.0)
    assert torch.equal(sample_from_base(model, tokenizer, base_context=model.disable_adapter, **options), expected)
    assert not torch.equal(sample_from_base(model, tokenizer, **options), expected)


def test_a_generation_config_tells_the_start_too(tiny_llama: Any) -> None:
    options: dict[str, Any] = {"num_sequences": 1, "num_tokens": 1, "seed": 0, "progress": False}
    for start, expected in (
        (GenerationConfig(bos_token_id=5, eos_token_id=7), 5),
        (GenerationConfig(eos_token_id=[7, 9]), 7),
    ):
        assert sample_from_base(tiny_llama(), start, **options)[0, 0] == expected
    with pytest.raises(ValueError, match="a GenerationConfig without BOS, EOS and newline"):
        sample_from_base(tiny_llama(), GenerationConfig(), **options)


def test_a_start_where_there_is_no_bos(tiny_llama: Any, tokenizer: Any) -> None:
    tokenizer.bos_token = None
    tokens = sample_from_base(tiny_llama(), tokenizer, num_sequences=1, num_tokens=1, seed=0, progress=False)
    assert tokens[0, 0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokens = sample_from_base(tiny_llama(), tokenizer, num_sequences=1, num_tokens=1, seed=0, progress=False)
    assert tokens[0, 0] == tokenizer.convert_tokens_to_ids("\n")
