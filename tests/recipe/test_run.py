"""The steps of a run: what is made is made once and handed on, and shards are freed before the whole model comes."""

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from condft.recipe import run
from condft.recipe.tuning import tuning_config
from condft.training import find_checkpoint, make_accelerator, make_engine
from condft.training.engines.base import Engine
from tests.helpers.calls import count_calls

MODULE = importlib.import_module("condft.recipe.run")  # the package's own `run` is the function
Configure = Callable[..., Any]


def test_config_engine_and_checkpoint_are_made_once(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a resumed run, which needs all of them."""
    _, config = configure("training.steps=1", "training.projector_steps=1")
    first = run(config, cpu=True)
    made = (tuning_config, make_accelerator, make_engine, find_checkpoint)
    counts = [count_calls(monkeypatch, function) for function in made]
    assert run(config, resume=True, cpu=True)["wer_after"] == first["wer_after"]
    assert [len(calls) for calls in counts] == [1, 1, 1, 1]


def test_a_wrong_setting_is_refused_before_anything_is_loaded(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = configure("tuning.trainable_fracton=0.1")
    calls = count_calls(monkeypatch, make_accelerator)
    with pytest.raises(ValueError, match=r"did you mean 'tuning\.trainable_fraction'"):
        run(config, cpu=True)
    assert calls == []


def test_shards_are_freed_before_the_whole_model_is_loaded(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP2 and ZeRO-3 need it; one process does not, so its engine is made to say that it does."""
    monkeypatch.setattr(Engine, "leaves_model_whole", False)
    trained: list[weakref.ref[Any]] = []
    select, load = MODULE.select_and_wrap, MODULE.load_adapted

    def selecting(*args: Any) -> Any:
        model = select(*args)
        trained.append(weakref.ref(model))
        return model

    def loading(*args: Any, **options: Any) -> Any:
        assert trained[0]() is None, "the trained model is still in memory"
        return load(*args, **options)

    monkeypatch.setattr(MODULE, "select_and_wrap", selecting)
    monkeypatch.setattr(MODULE, "load_adapted", loading)
    _, config = configure("training.self_distillation={num_sequences: 4, num_tokens: 8}")
    summary = run(config, cpu=True)
    assert summary["frozen_unchanged"] is True
    assert summary["trainable_parameters"] > 0


def test_a_changed_frozen_tensor_is_an_error_after_the_files_are_written(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    train = MODULE.train_model

    def training(engine: Any, model: Any, *args: Any, **options: Any) -> Any:
        result = train(engine, model, *args, **options)
        next(parameter for name, parameter in model.named_parameters() if "norm" in name).data += 1
        return result

    monkeypatch.setattr(MODULE, "train_model", training)
    _, config = configure("training.steps=1", "training.projector_steps=0")
    with pytest.raises(RuntimeError, match=r"1 frozen tensors changed and 0 are missing, the first is .*norm"):
        run(config, cpu=True)
    assert (tmp_path / "run" / "summary.json").exists()
