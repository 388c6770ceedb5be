"""The whole recipe on tiny real parts: a Whisper and a Llama of some thousand parameters, synthetic clips."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from condft.cli.app import app
from condft.recipe import evaluate_run, run
from condft.recipe.model import compose
from condft.report import SpectralReport
from tests.helpers.marks import needs_deepspeed
from tests.helpers.models.tiny_speech import write_clip
from tests.helpers.processes import ROOT
from tests.helpers.runs import losses

SUMMARY_KEYS = {
    "wer_before wer_after wer_after_en wer_after_de text_ce_before text_ce_after kl_to_base num_selected",
    "trainable_parameters total_parameters frozen_unchanged seconds_analyze seconds_train seconds_total",
    "peak_rss_bytes seed commit versions",
}


def test_a_run_leaves_everything_it_promises(configure: Callable[..., Any], tmp_path: Path) -> None:
    _, config = configure()
    summary = run(config, cpu=True)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(" ".join(SUMMARY_KEYS).split()) <= summary.keys()
    assert summary["frozen_unchanged"] is True
    assert summary["kl_to_base"] > 0
    assert summary["steps"] == {"projector": 2, "adapt": 4}
    for name in ("condition_numbers.png", "training.png", "tensorboard", "config.yaml"):
        assert (folder / name).exists(), name
    report = SpectralReport.load(folder / "spectral_report.json")
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["report_fingerprint"] == report.fingerprint == summary["report_fingerprint"]
    assert len(adapter["target_units"]) == summary["num_selected"]
    assert all(name.startswith("model.language_model.layers.") for name in adapter["target_units"])
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == summary["num_selected"] + 4  # and the projector's two layers with their biases
    assert sum(tensor.numel() for tensor in tensors.values()) == summary["trainable_parameters"]


def test_fisher_information_chooses_on_request(configure: Callable[..., Any], tmp_path: Path) -> None:
    _, config = configure("tuning.score=fisher_information")
    summary = run(config, cpu=True)
    report = SpectralReport.load(tmp_path / "run" / "spectral_report.json")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    layers = [row for row in report.rows if row.name.startswith("model.language_model.layers.")]
    assert all(row.fisher_information is not None for row in layers)
    assert all(row.fisher_information is None for row in report.rows if "audio_tower" in row.name)
    for kind in {row.module_type for row in layers}:
        rows = {row.name: row.fisher_information for row in layers if row.module_type == kind}
        chosen = [name for name in rows if name in adapter["target_units"]]
        assert sorted(chosen) == sorted(sorted(rows, key=rows.__getitem__)[: len(chosen)])
    assert summary["frozen_unchanged"] is True


def test_self_distillation_stays_nearer_the_base(configure: Callable[..., Any], tmp_path: Path) -> None:
    """On text that is neither KL's nor the Fisher information's."""
    apart = {}
    for name, settings in (("plain", "null"), ("distilled", "{weight: 30.0, every: 1, num_tokens: 12}")):
        _, config = configure(
            f"output_dir={tmp_path / name}", f"training.self_distillation={settings}", "training.steps=12"
        )
        summary = run(config, cpu=True)
        assert summary["frozen_unchanged"] is True
        apart[name] = summary["kl_to_base"]
    assert apart["distilled"] < 0.7 * apart["plain"]
    lines = [json.loads(line) for line in (tmp_path / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], "self_distillation_kl" in line) for line in lines] == [("projector", False)] * 2 + [
        ("adapt", True)
    ] * 12
    assert (tmp_path / "distilled" / "training.png").exists()


def test_the_same_seed_gives_the_same_run_and_another_does_not(configure: Callable[..., Any], tmp_path: Path) -> None:
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, config = configure(f"output_dir={tmp_path / name}", f"seed={seed}")
        runs[name] = run(config, cpu=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    changing = {"seconds_analyze", "seconds_train", "seconds_total", "peak_rss_bytes"}
    a, b = ({key: value for key, value in runs[name].items() if key not in changing} for name in "ab")
    assert a == b


def test_unusable_clips_are_left_out_before_training(
    configure: Callable[..., Any], parts: dict[str, str], tmp_path: Path
) -> None:
    speech = shutil.copytree(Path(parts["manifest"]).parent, tmp_path / "speech")
    write_clip(speech / "audio" / "long.flac", 1.5)
    with (speech / "manifest.jsonl").open("a") as file:
        for split in ("train", "test"):
            file.write(json.dumps({"audio": "audio/long.flac", "text": "<|im_end|>", "split": split}) + "\n")
    _, config = configure(f"data.manifest={speech / 'manifest.jsonl'}")
    with pytest.raises(ValueError, match=r"manifest\.jsonl:13: the text holds the control token"):
        run(config, cpu=True)
    _, config = configure(f"data.manifest={speech / 'manifest.jsonl'}", "data.skip_bad=true")
    summary = run(config, cpu=True)
    assert (summary["num_train_clips"], summary["num_test_clips"], summary["num_skipped_clips"]) == (8, 4, 2)
    figures = evaluate_run(tmp_path / "run")
    assert (figures["wer"], figures["num_skipped_clips"]) == (summary["wer_after"], 1)  # of the split it looks at


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tuning.trainable_fracton=0.1",
            "unknown key 'tuning.trainable_fracton'; did you mean 'tuning.trainable_fract",
        ),
        ("tuning.num_tensors=3", "at most one budget"),
        ("tuning.trainable_fraction=1e-6", "trains nothing"),
        ("data.manifest=nowhere.jsonl", "nowhere.jsonl is no file"),
        ("data.max_seconds=0.4", r"manifest.jsonl:4: .* more than the 0.4 s allowed"),
        ("model.language_model=nowhere/llm", "nowhere/llm"),
    ],
)
def test_bad_input_is_an_error_and_leaves_no_summary(
    configure: Callable[..., Any], tmp_path: Path, override: str, message: str
) -> None:
    _, config = configure(override)
    with pytest.raises((ValueError, OSError), match=message):
        run(config, cpu=True)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_command_line(configure: Callable[..., Any], tmp_path: Path, parts: dict[str, str]) -> None:
    path, _ = configure()
    runner = CliRunner()
    done = runner.invoke(app, ["train", str(path), "training.steps=1", "--cpu"])
    assert done.exit_code == 0, done.output
    assert "what was learned, and what was forgotten" in done.output
    again = runner.invoke(app, ["train", str(path), "--cpu"])
    assert again.exit_code == 1
    assert "already holds a run" in again.output
    assert "Traceback" not in again.output
    figures = tmp_path / "figures.json"
    evaluated = runner.invoke(app, ["evaluate", str(tmp_path / "run"), "--json", str(figures)])
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(figures.read_text())["num_clips"] == 4
    bad = runner.invoke(app, ["train", str(path), "training.stepz=1"])
    assert "did you mean 'training.steps'" in bad.output
    outputs = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "kappa.png")]
    analyzed = runner.invoke(app, ["analyze", parts["language_model"], *outputs])
    assert analyzed.exit_code == 0, analyzed.output
    assert "self_attn.q_proj" in analyzed.output
    assert (tmp_path / "kappa.png").stat().st_size > 10_000
    assert SpectralReport.load(tmp_path / "report.json").rows
    nowhere = runner.invoke(app, ["analyze", str(tmp_path / "nowhere")])
    assert (nowhere.exit_code, "is no checkpoint folder" in nowhere.output) == (1, True)


def test_what_trains_over_a_bf16_base_is_fp32(configure: Callable[..., Any], tmp_path: Path) -> None:
    """The projector as well as the copies, so that no small step of either is lost; and the run reads its own file."""
    _, config = configure("model.dtype=bfloat16", "training.learning_rate={projector: 1e-6, language_model: 1e-6}")
    summary = run(config, cpu=True)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    start = {key: p for key, p in compose(config, max_seconds=1)[0].named_parameters() if "projector" in key}
    for key, before in start.items():
        after = next(value for name, value in trained.items() if name.endswith(key.rpartition("projector.")[2]))
        assert not torch.equal(after, before), key
        torch.testing.assert_close(after, before.detach(), rtol=0, atol=1e-5)
    assert evaluate_run(tmp_path / "run")["text_ce"] == pytest.approx(summary["text_ce_after"], rel=1e-12)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [
        ("ddp_cpu", "float32", 1e-4),
        ("fsdp2_cpu", "float32", 1e-4),
        ("fsdp2_cpu", "bfloat16", 1e-2),  # whose products round by the batch's size
        pytest.param("deepspeed_zero2_cpu", "float32", 1e-4, marks=needs_deepspeed),
        pytest.param("deepspeed_zero3_cpu", "float32", 1e-4, marks=needs_deepspeed),
        pytest.param("deepspeed_zero3_cpu", "bfloat16", 1e-2, marks=needs_deepspeed),
    ],
)
def test_two_processes_agree_with_one(
    configure: Callable[..., Any], tmp_path: Path, engine: str, dtype: str, tolerance: float
) -> None:
    """Launched as a user would, on gloo: the same selection, and the same losses at the same global batch."""
    options = [f"model.dtype={dtype}"]
    path, config = configure("training.per_device_batch_size=4", f"output_dir={tmp_path / 'one'}", *options)
    single = run(config, cpu=True)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{engine}.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "scripts" / "train.py"), "--config", str(path)]
    command += ["training.per_device_batch_size=2", f"output_dir={tmp_path / 'two'}", *options]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    double = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert double["num_processes"] == 2
    assert double["report_fingerprint"] == single["report_fingerprint"]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert double["text_ce_after"] == pytest.approx(single["text_ce_after"], rel=tolerance)
    assert double["frozen_unchanged"] is True
