"""Pre-training of a tiny MoE: its points, resuming, the saved checkpoint, and the study on its experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from condft import analyze
from scripts.research.config import StudyConfig
from scripts.research.pretraining.run import Pretraining, PretrainingConfig, learning_rate, load_config, points_of
from scripts.research.study.results import Results
from scripts.research.study.run import run_study

TEXT = "The quick brown fox jumps over the lazy dog and the cat sleeps in the warm sun. "
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "router_aux_loss_coef": 0.01,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # layers this small only wait for a second one


@pytest.fixture
def config(tmp_path: Path) -> PretrainingConfig:
    (tmp_path / "train.txt").write_text(TEXT * 30)
    (tmp_path / "held_out.txt").write_text("A lazy cat jumps over the brown fox in the sun. " * 5)
    return PretrainingConfig(
        output=str(tmp_path / "moe"),
        workspace=str(tmp_path / "state"),
        results=str(tmp_path / "points.jsonl"),
        train_text=str(tmp_path / "train.txt"),
        held_out_text=str(tmp_path / "held_out.txt"),
        vocabulary=300,
        model=MODEL,
        window=16,
        batch_size=4,
        steps=20,
        warmup_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        points=[0, 5, 20],
        held_out_tokens=64,
        save_every=10,
    )


def test_it_learns_and_measures_every_weight_at_every_point(config: PretrainingConfig) -> None:
    Pretraining(config).run()
    points = points_of(config)
    assert [point["step"] for point in points] == [0, 5, 20]
    assert points[0]["train_loss"] is None
    assert points[-1]["held_out_loss"] < points[0]["held_out_loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(config.output)
    report = analyze(model, measures="all", cache=False, progress=False)
    last = points[-1]["weights"]
    assert sorted(last) == [row.name for row in report.rows]
    assert len([name for name in last if "experts" in name]) == 2 * 2 * 4
    for row in report.rows:
        assert last[row.name]["condition_number"] == pytest.approx(row.condition_number, rel=1e-3), row.name
    text = AutoTokenizer.from_pretrained(config.output)
    assert text.decode(text("Größe of the fox")["input_ids"]) == "Größe of the fox"


def test_an_interrupted_run_goes_on_to_the_same_figures(
    config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretraining(config).run()
    whole = points_of(config)
    Path(config.results).rename(tmp_path / "whole.jsonl")
    [state] = Path(config.workspace).iterdir()
    state.unlink()
    run = Pretraining(config)
    step = run._train_step

    def interrupted() -> None:
        if run.step == 13:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(run, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = Pretraining(config)
    assert again.step == 10
    again.run()
    Pretraining(config).run()  # there is nothing left to do
    lines = [json.loads(line) for line in Path(config.results).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["point", "point", "point", "run"]
    for first, second in zip(whole, points_of(config), strict=True):
        assert first["weights"] == second["weights"]
        assert first["held_out_loss"] == second["held_out_loss"]


def test_the_rate_rises_and_falls_to_a_tenth(config: PretrainingConfig) -> None:
    rates = [learning_rate(config, step) for step in (1, 2, 11, 20)]
    assert rates == pytest.approx([5e-3, 1e-2, 5.5e-3, 1e-3])


def test_another_seed_is_another_base_in_a_folder_of_its_own(config: PretrainingConfig, tmp_path: Path) -> None:
    content = {**config.model_dump(mode="json"), "output": "bases/{seed}", "seed": 3}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    first, second = load_config(tmp_path / "c.yaml"), load_config(tmp_path / "c.yaml", seed=4)
    assert (first.seed, first.output, second.seed, second.output) == (3, "bases/3", 4, "bases/4")
    assert first.key() != second.key()


def test_points_must_begin_at_the_initialization(config: PretrainingConfig) -> None:
    with pytest.raises(ValueError, match=r"rise from 0 to steps=20"):
        PretrainingConfig.model_validate({**config.model_dump(), "points": [5, 20]})


EXPERT_ARMS = (
    "lowest_within_type",
    "random_within_type",
    "highest_within_type",
    "lowest_across_types",
    "lowest_within_type_distilled",
    "fisher_within_type",
    "fisher_per_gain_within_type",
    "random_same_shapes",
    "lora_all_linear",
    "lora_equal_budget",
    "full_fine_tuning",
)


def study_of_experts(config: PretrainingConfig, folder: Path) -> StudyConfig:
    (folder / "german.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund. " * 30)
    content: dict[str, Any] = {
        "results": str(folder / "study.jsonl"),
        "workspace": str(folder / "shared"),
        "language_model": config.output,
        "text": {"file": str(folder / "german.txt"), "window": 16, "test_windows": 4},
        "trainable_fraction": 0.5,
        "training": {"steps": 2, "per_device_batch_size": 4, "warmup_steps": 1,
                     "self_distillation": {"num_sequences": 4, "num_tokens": 8}},
        "evaluation": {"text": config.held_out_text, "text_tokens": 64, "context_length": 16,
                       "sampled_sequences": 2, "sampled_tokens": 8},
        "final_text_tokens": 64,
        "points": [2],
        "seeds": [0],
        "levels": [5.0],
        "arms": {name: {"rates": [1e-2]} for name in EXPERT_ARMS},
    }  # fmt: skip
    return StudyConfig.model_validate(content)


def test_every_arm_trains_experts(config: PretrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))
    Pretraining(config).run()
    study = study_of_experts(config, tmp_path)
    run_study(study)
    runs = {run["arm"]: run for run in Results(study).runs.values()}
    assert {name: run.get("error") for name, run in runs.items()} == dict.fromkeys(EXPERT_ARMS)
    layers = runs["full_fine_tuning"]["trainable_parameters"]
    assert layers == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * (96 + 48) * 32)
    for name in EXPERT_ARMS:
        if name not in ("full_fine_tuning", "lora_all_linear"):
            assert 0.35 < runs[name]["trainable_parameters"] / layers <= 0.55, name
    chosen = runs["lowest_within_type"]["selected"]
    for kind in ("gate_up_proj[", "down_proj["):
        assert sum(kind in name for name in chosen) == 4  # half of eight
    assert chosen != runs["highest_within_type"]["selected"]
    # LoRA of rank 16 on every attention weight and on every expert of the stacks
    attention = 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    experts = 16 * 2 * 4 * ((32 + 96) + (48 + 32))
    assert runs["lora_all_linear"]["trainable_parameters"] == attention + experts
