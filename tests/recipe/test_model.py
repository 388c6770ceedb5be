"""The composed model of a run, and what is noted of it before training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model

from condft.recipe.model import BaseFacts, compose, load_adapted, window_of
from condft.recipe.tuning import tuning_config


@pytest.mark.parametrize("key", ["audio_tower", "language_model"])
def test_a_missing_part_is_named_with_its_setting(configure: Callable[..., Any], key: str) -> None:
    _, config = configure(f"model.{key}=nowhere/part")
    with pytest.raises(FileNotFoundError, match=f"model.{key}='nowhere/part' is neither a checkpoint folder"):
        compose(config, max_seconds=1.0)


def test_the_window_is_that_of_the_encoder(configure: Callable[..., Any]) -> None:
    assert window_of(configure()[1]) == 30


def test_facts_of_the_base_do_not_change_when_it_is_wrapped(configure: Callable[..., Any]) -> None:
    _, config = configure()
    model, _ = compose(config, max_seconds=1.0)
    before = BaseFacts.of(model)
    assert before.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    wrapped = get_peft_model(model, tuning_config(config.tuning, seed=0))
    after = BaseFacts.of(wrapped)
    assert before.checksums.items() <= after.checksums.items()
    assert after.num_parameters > before.num_parameters  # the copies that train


def test_an_adapter_comes_back_on_a_base_composed_anew(configure: Callable[..., Any], tmp_path: Any) -> None:
    _, config = configure()
    model, processor = compose(config, max_seconds=1.0)
    wrapped = get_peft_model(model, tuning_config(config.tuning, seed=0))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    for is_trainable in (False, True):
        loaded = load_adapted(config, processor, tmp_path / "adapter", is_trainable=is_trainable)
        assert any(parameter.requires_grad for parameter in loaded.parameters()) is is_trainable
        expected = dict(wrapped.named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in loaded.named_parameters())
