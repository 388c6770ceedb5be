"""The single-tensor experiment end to end on a tiny model: resuming, repeating, restoring, reporting."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from condft.training import read_metrics
from scripts.research.config import StudyConfig
from scripts.research.damage.columns import load_columns
from scripts.research.damage.report import write_report
from scripts.research.damage.run import Experiment, Protocol, run_experiment, second_norm, spread_order
from tests.helpers.models.tiny_speech import save_language_model

PROTOCOL = Protocol(
    gradient_batches=3,
    gain_windows=4,
    damage_windows=4,
    sampled_sequences=4,
    sampled_tokens=8,
    relative_norm=0.2,
    narrowest=0.5,
)
MEASURED = ("points", "gradient_norm", "slope", "fisher_trace", "fisher_along", "condition_number")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)  # layers this small only wait for a second thread
    (tmp_path / "english.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "german.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund. " * 20)
    content: dict[str, Any] = {
        "results": "unused",
        "workspace": "unused",
        "language_model": _with_effect(save_language_model(tmp_path / "llama")),
        "text": {"file": str(tmp_path / "german.txt"), "window": 16, "test_windows": 6},
        "trainable_fraction": 0.2,
        "training": {"projector_steps": 0, "steps": 1, "per_device_batch_size": 2},
        "evaluation": {"text": str(tmp_path / "english.txt")},
        "final_text_tokens": 16,
        "points": [1],
        "seeds": [0],
        "levels": [1.0],
        "arms": {},
    }
    return StudyConfig.model_validate(content)


def _with_effect(folder: str) -> str:
    """Layers so large that a change of any one of them stands above fp32's rounding."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(10.0 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(folder)
    return folder


def figures(path: Path) -> dict[tuple[str, str], list[Any]]:
    return {(line["kind"], line["name"]): [line.get(key) for key in MEASURED] for line in read_metrics(path)}


def test_an_interrupted_experiment_goes_on_and_a_second_one_gives_the_same_figures(
    config: StudyConfig, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    one = "model.layers.1.mlp.up_proj.weight"
    assert run_experiment(config, PROTOCOL, first, tmp_path / "shared", only=[one]) == 1
    assert run_experiment(config, PROTOCOL, first, tmp_path / "shared") == 13
    assert run_experiment(config, PROTOCOL, first, tmp_path / "shared") == 0
    assert run_experiment(config, PROTOCOL, second, tmp_path / "elsewhere") == 14
    assert figures(first) == figures(second)

    table = load_columns(first)
    assert len(table.names) == 14
    assert len(table.type_names) == 7
    assert (table.targets["kl"] > 0).all()
    assert [path.stat().st_size > 1000 for path in write_report(first)] == [True, True]


def test_measuring_leaves_the_model_as_it_was(config: StudyConfig, tmp_path: Path) -> None:
    experiment = Experiment(config, PROTOCOL, tmp_path / "results.jsonl", tmp_path / "shared")
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    experiment.measure(experiment.names[0])
    assert all(torch.equal(value, before[name]) for name, value in experiment.model.state_dict().items())
    assert experiment.english.change(0).kl == pytest.approx(0.0, abs=1e-7)


def test_every_beginning_of_the_order_spreads_over_the_depth() -> None:
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in ("mlp.up", "self_attn.q")]
    order = spread_order(names)
    assert sorted(order) == sorted(names)
    for count in (4, 8, 16):
        layers = sorted(int(name.split(".")[2]) for name in order[: 2 * count : 2])
        assert max(np.diff([0, *layers, 30])) <= 2 * 30 / count


def test_the_second_norm_aims_at_the_equal_gain_and_stays_near() -> None:
    protocol = Protocol(relative_norm=0.02, equal_gain=0.01, narrowest=0.25, widest=4)
    assert second_norm(protocol, 0.005) == pytest.approx(0.04)
    assert second_norm(protocol, 1.0) == pytest.approx(0.005)
    assert second_norm(protocol, 1e-6) == second_norm(protocol, -0.01) == pytest.approx(0.08)
