"""A folder that holds a run already: resumed, refused, or replaced."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from condft.recipe import run
from condft.training import load_config
from tests.helpers.isolation import forget_accelerate
from tests.helpers.models.tiny_speech import write_clip
from tests.helpers.runs import losses


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_is_the_uninterrupted_run(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in stage 2 by an interrupt, as Ctrl-C does it, and continued."""
    distilled = "training.self_distillation={every: 2, num_sequences: 6, num_tokens: 12}"
    _, config = configure(f"output_dir={tmp_path / 'whole'}", distilled)
    whole = run(config, cpu=True)
    _, config = configure(f"output_dir={tmp_path / 'parts'}", distilled)

    from condft.training import metrics

    append = metrics.MetricsFile.append

    def interrupted(self: Any, record: Any) -> None:
        if record["global_step"] == 6:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(metrics.MetricsFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, cpu=True)
    monkeypatch.undo()
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))
    assert not (tmp_path / "parts" / "summary.json").exists()
    forget_accelerate()
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(config, cpu=True)
    resumed = run(config, resume=True, cpu=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert resumed["text_ce_after"] == whole["text_ce_after"]
    assert resumed["wer_after"] == whole["wer_after"]


def test_a_checkpoint_of_another_config_is_refused_before_anything_is_done(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = configure()
    run(config, cpu=True)
    before = contents(tmp_path / "run")
    _, other = configure("tuning.trainable_fraction=0.5")
    module = importlib.import_module("condft.recipe.tuning")
    monkeypatch.setattr(module, "analyze", lambda *args, **kwargs: pytest.fail("analyzed"))
    with pytest.raises(ValueError, match=r"tuning.trainable_fraction: 0.3 there, 0.5 now"):
        run(other, resume=True, cpu=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("changed", ["training data", "base model"])
def test_a_checkpoint_of_other_inputs_is_refused(
    configure: Callable[..., Any], parts: dict[str, str], tmp_path: Path, changed: str
) -> None:
    """Under the same names: what the YAML says is the same."""
    speech, llama = (
        shutil.copytree(Path(parts[key]).parent if key == "manifest" else parts[key], tmp_path / key)
        for key in ("manifest", "language_model")
    )
    _, config = configure(f"data.manifest={speech / 'manifest.jsonl'}", f"model.language_model={llama}")
    run(config, cpu=True)
    before = contents(tmp_path / "run")
    if changed == "training data":
        write_clip(speech / "audio" / "1.flac", 0.35, seed=99)
    else:
        weights = load_file(llama / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] += 1
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"00000006-adapt was taken with another {changed}"):
        run(config, resume=True, cpu=True)
    assert contents(tmp_path / "run") == before


def test_overwrite_deletes_only_for_a_run_that_can_begin(configure: Callable[..., Any], tmp_path: Path) -> None:
    """Also where the YAML given is the run's own."""
    _, config = configure("training.steps=1", "training.projector_steps=0")
    run(config, cpu=True)
    folder = tmp_path / "run"
    before = contents(folder)
    for override in (
        "data.manifest=nowhere.jsonl",
        "model.language_model=nowhere/llm",
        "tuning.trainable_fraction=1e-6",
        "evaluation.text=nowhere.txt",
    ):
        with pytest.raises((ValueError, OSError)):
            run(load_config(folder / "config.yaml", [override]), overwrite=True, cpu=True)
        assert contents(folder) == before, override
    run(load_config(folder / "config.yaml", ["training.steps=2"]), overwrite=True, cpu=True)
    assert len(losses(folder)) == 2
    assert load_config(folder / "config.yaml").training.steps == 2
