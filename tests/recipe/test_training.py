"""The training step: its result holds the last checkpoint, and the adapter is written from that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from condft.recipe.data import load_speech, prepare_data
from condft.recipe.model import compose, load_adapted
from condft.recipe.training import save_adapter, train_model
from condft.recipe.tuning import analyze_base, select_and_wrap, tuning_config
from condft.training import make_accelerator, make_engine


def test_the_adapter_is_the_last_checkpoint(configure: Callable[..., Any], tmp_path: Path) -> None:
    _, config = configure("training.steps=2", "training.projector_steps=1")
    engine = make_engine(make_accelerator(config, cpu=True))
    speech = load_speech(config.data)
    model, processor = compose(config, max_seconds=speech.longest_seconds)
    data = prepare_data(model, processor, speech, config)
    tuning = tuning_config(config.tuning, seed=0)
    report = analyze_base(model, data.tokenizer, tuning, config, progress=False).report
    wrapped = select_and_wrap(model, tuning, report, engine)
    training = train_model(engine, wrapped, data, config, resume_from=None, inputs={"base model": "x"})
    assert [(result.stage, result.steps) for result in training.results] == [("projector", 1), ("adapt", 2)]
    assert training.checkpoint.path == tmp_path / "run" / "checkpoints" / "00000003-adapt"
    assert training.checkpoint.inputs == {"base model": "x"}
    trained = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():  # what becomes of the model after training does not reach the adapter
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    save_adapter(engine, wrapped, processor, training.checkpoint, tmp_path / "adapter")
    loaded = dict(load_adapted(config, processor, tmp_path / "adapter").named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert (tmp_path / "adapter" / "processor_config.json").exists()
