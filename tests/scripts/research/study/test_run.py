"""The study's harness, end to end on tiny real parts: runs, resuming, claims, and every arm of the registry."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from scripts.research.config import StudyConfig, load_study
from scripts.research.store import claimed
from scripts.research.study.arms import ARMS
from scripts.research.study.plan import RunSpec
from scripts.research.study.report import write_report
from scripts.research.study.results import Results, best_rates
from scripts.research.study.run import Study, run_study
from tests.helpers.isolation import forget_accelerate
from tests.helpers.models.tiny_speech import save_language_model, save_whisper, write_manifest

RATES = [1e-3, 3e-3, 1e-2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (folder / "german.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund. " * 20)
    return {
        "audio_tower": save_whisper(folder / "whisper"),
        "language_model": save_language_model(folder / "llama"),
        "manifest": str(write_manifest(folder / "speech", [0.3 + 0.05 * i for i in range(8)], num_test=4)),
        "text": str(folder / "text.txt"),
        "german": str(folder / "german.txt"),
    }


def study_file(folder: Path, parts: dict[str, str], arms: dict[str, Any], *, task: str = "speech") -> Path:
    sections = {
        "speech": {"audio_tower": parts["audio_tower"], "manifest": parts["manifest"], "projector_rate": 1e-2},
        "text": {"file": parts["german"], "window": 16, "test_windows": 4},
    }
    content = {
        "results": str(folder / "results.jsonl"),
        "workspace": str(folder / "shared"),
        "language_model": parts["language_model"],
        task: sections[task],
        "trainable_fraction": 0.2,
        "training": {"projector_steps": 1, "steps": 4, "per_device_batch_size": 4, "warmup_steps": 1}
        | {"self_distillation": {"num_sequences": 3, "num_tokens": 6}},
        "evaluation": {
            "max_new_tokens": 2,
            "text": parts["text"],
            "text_tokens": 60,
            "context_length": 30,
            "sampled_sequences": 2,
            "sampled_tokens": 8,
        },
        "final_text_tokens": 90,
        "points": [2, 4],
        "wer_points": [4] if task == "speech" else [],
        "seeds": [0, 1],
        "levels": [5.4],
        "arms": arms,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def study(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CONDFT_CACHE", str(tmp_path / "cache"))
    return lambda arms, **options: load_study(study_file(tmp_path, parts, arms, **options))


def results_of(config: StudyConfig) -> Results:
    return Results(config)


def test_a_study_does_every_run_once_and_in_the_order_of_the_plan(study: Any) -> None:
    config = study(
        {
            "lora_all_linear": {"rates": [1e-3]},
            "lowest_within_type": {"rates": RATES, "main": True},
            "random_within_type": {"rates": [1e-3], "main": True},
        }
    )
    assert run_study(config, max_runs=2) == 2
    assert run_study(config) == 6
    assert run_study(config) == 0
    results = results_of(config)
    [best] = best_rates(config, results)["lowest_within_type"]
    assert list(results.by_spec()) == [
        RunSpec("lowest_within_type", 3e-3, 0),
        RunSpec("random_within_type", 1e-3, 0),
        RunSpec("lowest_within_type", 1e-3, 0),
        RunSpec("lowest_within_type", 1e-2, 0),
        RunSpec("lowest_within_type", best, 1),
        RunSpec("random_within_type", 1e-3, 1),
        RunSpec("lora_all_linear", 1e-3, 0),
        RunSpec("lora_all_linear", 1e-3, 1),
    ]
    for key, run in results.runs.items():
        assert run["status"] == "finished", run
        assert [point["step"] for point in results.points[key]] == [0, 2, 4]
        assert "wer_de" in results.points[key][-1]
        assert results.points[key][-1]["kl_to_base"] > 0
    assert_reported(config, results)


def assert_reported(config: StudyConfig, results: Results) -> None:
    """Tables and figures come from the JSONL alone, without the workspace, the models or the data."""
    shutil.rmtree(config.workspace)
    all_get_there = max(points[-1]["test_loss"] for points in results.points.values())
    config = config.model_copy(update={"levels": [all_get_there]})
    tables, *figures = write_report(config, results)
    text = tables.read_text()
    assert "8 runs finished, 0 failed, of 8 planned" in text
    assert "| random_within_type | 0.001 | 1 of 1 | 2 of 2 |" in text
    assert "n = 2" in text
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_seed_gives_the_same_figures_again_and_stage_1_is_shared(study: Any, tmp_path: Path) -> None:
    arms = {"lowest_within_type": {"rates": [1e-2]}, "random_within_type": {"rates": [1e-2]}}
    config = study(arms)
    run_study(config, seeds=[0])
    first = results_of(config)
    starts = {points[0]["test_loss"] for points in first.points.values()}
    assert len(starts) == 1
    assert len(list((tmp_path / "shared").glob("projector-*.safetensors"))) == 1
    Path(config.results).rename(tmp_path / "first.jsonl")
    run_study(config, seeds=[0])
    second = results_of(config)
    for key, points in first.points.items():
        again = [{**point, "attempt": ""} for point in second.points[key]]
        assert [{**point, "attempt": ""} for point in points] == again


def test_an_interrupted_run_is_done_again_and_its_points_do_not_count(
    study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study({"lowest_within_type": {"rates": [1e-2]}})
    from scripts.research.study import run as _study_run

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_study_run, "measure_end", interrupted)
        run_study(config, seeds=[0])
    lines = [json.loads(line) for line in Path(config.results).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["point"] * 3
    assert results_of(config).runs == {}
    # the second that an attempt began in is its name
    content = Path(config.results).read_text().replace(lines[0]["attempt"], "2000-01-01T00:00:00+00:00")
    Path(config.results).write_text(content)
    forget_accelerate()
    assert run_study(config, seeds=[0]) == 1
    results = results_of(config)
    (key,) = results.runs
    assert [point["step"] for point in results.points[key]] == [0, 2, 4]


def test_forgetting_is_measured_in_fp32_though_training_is_not(study: Any) -> None:
    """The projector touches no text: computed in fp32 as the base's own figures are, the changes are exactly 0."""
    config = study({"projector_only": {"rates": [1e-2]}})
    training = config.training.model_copy(update={"mixed_precision": "bf16"})
    config = config.model_copy(update={"training": training})
    run_study(config, seeds=[0])
    results = results_of(config)
    ((key, points),) = results.points.items()
    assert results.runs[key]["status"] == "finished"
    assert [(point["text_ce_change"], point["cloze_change"], point["kl_to_base"]) for point in points] == [
        (0, 0, 0)
    ] * 3


def test_a_run_that_another_process_has_is_passed_over(study: Any, tmp_path: Path) -> None:
    config = study({"lowest_within_type": {"rates": [1e-2]}, "random_within_type": {"rates": [1e-2]}})
    key = Study(config).key(RunSpec("lowest_within_type", 1e-2, 0))
    with claimed(tmp_path / "shared" / "claims", key) as free:
        assert free
        forget_accelerate()
        run_study(config, seeds=[0])
    assert [run["arm"] for run in results_of(config).runs.values()] == ["random_within_type"]


def test_a_diverged_run_is_recorded_and_not_tried_again(study: Any) -> None:
    config = study({"full_fine_tuning": {"rates": [1e30]}})
    assert run_study(config, seeds=[0]) == 1
    (run,) = results_of(config).runs.values()
    assert run["status"] == "failed"
    assert "the loss is" in run["error"] or "not finite" in run["error"]
    forget_accelerate()
    assert run_study(config, seeds=[0]) == 0


def test_a_fault_in_what_runs_share_is_no_failed_run(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.research.study import measure as _study_measure

    def broken(*arguments: Any, **options: Any) -> float:
        raise ValueError("the base's logits are not finite")

    config = study({"lowest_within_type": {"rates": [1e-2]}}, task="text")
    monkeypatch.setattr(_study_measure, "cloze_log_probability", broken)
    with pytest.raises(ValueError, match="the base's logits"):
        run_study(config, seeds=[0])
    assert not Path(config.results).exists()


# What treats the projector in a way of its own; the rest is the same for both tasks.
OF_SPEECH = ("full_fine_tuning", "lora_equal_budget", "lowest_within_type_distilled", "osf", "projector_only")


@pytest.mark.parametrize("task", ["speech", "text"])
def test_every_arm_trains_its_budget(study: Any, task: str) -> None:
    names = OF_SPEECH if task == "speech" else [name for name in ARMS if name != "projector_only"]
    config = study({name: {"rates": [1e-2]} for name in names}, task=task)
    run_study(config, seeds=[0])
    results = results_of(config)
    runs = {run["arm"]: run for run in results.runs.values()}
    assert {name: run.get("error") for name, run in runs.items()} == dict.fromkeys(names)
    projector = runs["projector_only"]["trainable_parameters"] if task == "speech" else 0
    layers = runs["full_fine_tuning"]["trainable_parameters"] - projector
    for name, run in runs.items():
        last = results.points[run["key"]][-1]
        if name == "projector_only":
            assert last["text_ce_change"] == last["kl_to_base"] == 0.0
            continue
        assert last["kl_to_base"] > 0, name
        if name.removesuffix("_distilled") not in ("full_fine_tuning", "lora_all_linear", "lora_kappa_targets"):
            # a weight of this tiny model is 1/15 of all its layers: a budget of 1/5 holds 3, or 2 of them
            share = (run["trainable_parameters"] - projector) / layers
            assert 0.1 < share < 0.25, name
    if task == "text":
        assert runs["lowest_within_type"]["selected"] != runs["highest_within_type"]["selected"]


def test_only_distilled_arms_self_distill_and_they_stay_nearer_the_base(study: Any, tmp_path: Path) -> None:
    names = ("lora_all_linear", "lora_all_linear_distilled")
    config = study({name: {"rates": [1e-1]} for name in names}, task="text")
    settings = config.training.self_distillation.model_copy(update={"weight": 100.0, "every": 1})
    config = config.model_copy(update={"training": config.training.model_copy(update={"self_distillation": settings})})
    run_study(config, seeds=[0])
    results = results_of(config)
    apart = {run["arm"]: results.points[key][-1]["kl_to_base"] for key, run in results.runs.items()}
    level = max(points[-1]["test_loss"] for points in results.points.values())
    tables, *_ = write_report(config.model_copy(update={"levels": [level]}), results)
    assert "## Self-distillation at test loss" in tables.read_text()
    assert "| lora_all_linear |" in tables.read_text().split("## Self-distillation")[1].split("\n\n")[1]
    assert 0 < apart[names[1]] < apart[names[0]]  # Adam takes four steps of much the same size in both
    assert len(list((tmp_path / "shared").glob("sampled-text-*.safetensors"))) == 1


def test_seeds_have_bases_of_their_own_where_the_model_says_so(study: Any, parts: Any, tmp_path: Path) -> None:
    config = study({"lowest_within_type": {"rates": RATES}}, task="text")
    for seed in (0, 1):
        shutil.copytree(parts["language_model"], tmp_path / "bases" / str(seed))
    weights = tmp_path / "bases" / "1" / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    config = config.model_copy(update={"language_model": str(tmp_path / "bases" / "{seed}")})
    assert run_study(config) == 6
    results = results_of(config)
    starts = {run["seed"]: results.points[key][0]["test_loss"] for key, run in results.runs.items()}
    assert len(set(starts.values())) == len({run["inputs"] for run in results.runs.values()}) == 2
    tables, *_ = write_report(config, results)
    assert "| lowest_within_type | 0.001, 0.003, 0.01 | 1 at 0.001; 1 at 0.003; 1 at 0.01 | 0 |" in tables.read_text()
    assert "the intervals are over bases" in tables.read_text()


def test_a_study_refuses_what_it_does_not_have(study: Any) -> None:
    config = study({"lowest_within_type": {"rates": [1e-2]}})
    with pytest.raises(ValueError, match="no arm 'typo'"):
        run_study(config, only=["typo"])
    with pytest.raises(ValueError, match="no seed 7"):
        run_study(config, seeds=[7])
