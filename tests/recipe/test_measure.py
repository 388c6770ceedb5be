"""Measurements of a tiny audio LLM: order of the texts, KL of an untrained adapter, and text sampled with a seed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from condft.recipe import measure
from condft.recipe.data import RunData, load_speech, prepare_data
from condft.recipe.measure import kl_on_sampled_text, make_self_distillation, measure_fisher, measure_model
from condft.recipe.model import compose
from condft.recipe.tuning import tuning_config
from condft.report import SpectralReport

Setup = Callable[..., tuple[Any, RunData, Any]]


@pytest.fixture
def setup(configure: Callable[..., Any]) -> Setup:
    def make(*overrides: str) -> tuple[Any, RunData, Any]:
        _, config = configure(*overrides)
        speech = load_speech(config.data)
        model, processor = compose(config, max_seconds=speech.longest_seconds)
        return model, prepare_data(model, processor, speech, config), config

    return make


def test_texts_are_in_the_order_of_the_clips_whatever_the_batches(setup: Setup) -> None:
    """Batches are sorted by length, so that the last clips of the manifest, the longest, come last in them too."""
    model, data, config = setup()
    data.test.reverse()
    found = [
        measure_model(model, data, config.evaluation.model_copy(update={"per_device_batch_size": size}))
        for size in (1, 3)
    ]
    assert found[0].transcription == found[1].transcription
    assert found[0].transcription.references == [example["text"] for example in data.test]
    assert found[0].text == found[1].text
    assert found[0].transcription.report.num_clips == 4


def test_an_untrained_adapter_is_at_no_distance_from_the_base(setup: Setup) -> None:
    model, data, config = setup()
    wrapped = get_peft_model(model, tuning_config(config.tuning, seed=0))
    assert kl_on_sampled_text(wrapped, data.tokenizer, config.evaluation, seed=0) == 0.0
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "projector" not in name:
                parameter.mul_(1.5)
    assert kl_on_sampled_text(wrapped, data.tokenizer, config.evaluation, seed=0) > 0.0


def test_self_distillation_is_made_where_the_run_wants_it(setup: Setup) -> None:
    settings = "training.self_distillation={num_sequences: 3, num_tokens: 5}"
    model, data, config = setup(settings)
    wrapped = get_peft_model(model, tuning_config(config.tuning, seed=0))
    made = make_self_distillation(wrapped, data.tokenizer, config)
    assert made is not None
    assert made.tokens.shape == (3, 1 + 5)
    stages = config.training.model_copy(update={"steps": 0})  # the language model does not learn
    assert make_self_distillation(wrapped, data.tokenizer, config.model_copy(update={"training": stages})) is None
    without = config.training.model_copy(update={"self_distillation": None})
    assert make_self_distillation(wrapped, data.tokenizer, config.model_copy(update={"training": without})) is None


def test_every_kind_of_sampled_text_has_a_seed_of_its_own(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, config = setup("training.self_distillation={num_sequences: 2, num_tokens: 4}")
    seeds: list[int] = []

    def sampling(*_: Any, num_sequences: int, num_tokens: int, seed: int, **__: Any) -> torch.Tensor:
        seeds.append(seed)
        return torch.ones(num_sequences, num_tokens, dtype=torch.long)

    monkeypatch.setattr(measure, "sample_from_base", sampling)
    monkeypatch.setattr(measure, "add_fisher_information", lambda report, *_: report)
    measure_fisher(model, data.tokenizer, SpectralReport(()), config.evaluation, seed=7)
    wrapped = get_peft_model(model, tuning_config(config.tuning, seed=0))
    make_self_distillation(wrapped, data.tokenizer, config.model_copy(update={"seed": 7}))
    kl_on_sampled_text(wrapped, data.tokenizer, config.evaluation, seed=7)
    assert sorted(seeds) == [7, 8, 9]
