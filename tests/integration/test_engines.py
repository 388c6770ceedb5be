"""Two processes train to the weights of one, on every engine that runs on a CPU; a cut-off run resumes to the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from condft.tasks.speech.features import PassThroughTower
from condft.training import (
    RunConfig,
    find_checkpoint,
    make_accelerator,
    make_engine,
    prepare_output_dir,
    read_metrics,
    train,
)
from condft.training.checkpoint import load_trained
from tests.helpers.marks import needs_deepspeed, needs_gpu, needs_two_gpus
from tests.helpers.models.trainees import build_self_distillation
from tests.helpers.processes import ROOT, WORKERS

CONFIGS = ROOT / "configs" / "accelerate"


def launch(
    engine: str, folder: Path, content: dict[str, Any], *, device: str = "cpu", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs `train.py` by a file of `configs/accelerate`, with changes to it, and reads its result."""
    config, target, launcher = folder / "config.yaml", folder / "result.pt", folder / "launcher.yaml"
    config.write_text(yaml.safe_dump(content))
    settings = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text())
    for key, value in (changes or {}).items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    launcher.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += ["--main_process_port", "0", str(WORKERS / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(config), str(target), device],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(target, weights_only=True)


def train_alone(content: dict[str, Any], model: PeftModel, data: Any, *, cpu: bool) -> tuple[Any, dict[str, Any]]:
    """In this process: the losses of each stage, and the trained weights."""
    config = RunConfig.model_validate(content)
    prepare_output_dir(config.output_dir)
    settings = config.training.self_distillation
    distillation = build_self_distillation(model, settings) if settings else None
    results = train(make_engine(make_accelerator(config, cpu=cpu)), model, *data, config, distillation=distillation)
    checkpoint = find_checkpoint(config, num_processes=1)
    assert checkpoint is not None
    return [result.losses for result in results], load_trained(checkpoint)


def divided(content: dict[str, Any], folder: Path, processes: int) -> dict[str, Any]:
    """4 clips a step, one a micro-batch, among several processes."""
    training = content["training"] | {"gradient_accumulation_steps": 4 // processes}
    return content | {"training": training, "output_dir": str(folder / "two")}


FROM_META = {"fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}
ZERO2 = ("deepspeed_zero2_cpu", "DEEPSPEED", "Tensor")
ZERO3 = ("deepspeed_zero3_cpu", "DEEPSPEED", "partition")
OFFLOADED = {"deepspeed_config": {"offload_optimizer_device": "cpu"}}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "kind", "tensors", "changes"),
    [
        ("ddp_cpu", "MULTI_CPU", "Tensor", {}),
        ("fsdp2_cpu", "FSDP", "DTensor", {}),
        pytest.param("fsdp2_cpu", "FSDP", "DTensor", FROM_META, id="fsdp2_from_meta"),
        pytest.param(*ZERO2, {}, marks=needs_deepspeed, id="zero2"),
        pytest.param(*ZERO2, OFFLOADED, marks=needs_deepspeed, id="zero2_adam"),
        pytest.param(*ZERO3, {}, marks=needs_deepspeed, id="zero3"),
        pytest.param(*ZERO3, OFFLOADED, marks=needs_deepspeed, id="zero3_adam"),
    ],
)
def test_two_processes_are_one(
    content: dict[str, Any],
    tmp_path: Path,
    condft_trainee: Any,
    audio_llm: Any,
    data: Any,
    engine: str,
    kind: str,
    tensors: str,
    changes: dict[str, Any],
) -> None:
    """4 clips a step, one a micro-batch, on one process or two on each of two: the same losses, weights and adapter.

    To 1e-6 in fp32 (measured: 2.4e-7), which is the order in which four gradients are added up. In one batch of four
    instead of four micro-batches, the weights of one process differ by 9.05e-7 at most (1.5e-6 on another CPU): a
    matrix product over four clips adds in another order than four products, and AdamW's first step treats a
    gradient of 1.4e-6 nearly like one of 3e-2. The same tensors unfrozen by hand in plain PyTorch differ as much, to
    the last digit.
    """
    content["training"] |= {"checkpoint_every": 2, "per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    two = launch(engine, tmp_path, divided(content, tmp_path, 2), changes=changes)
    assert (two["engine"], two["processes"], two["sharded"]) == (f"DistributedType.{kind}", 2, [tensors])

    losses, expected = train_alone(content, condft_trainee(), data, cpu=True)
    for ours, theirs in zip(losses, two["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    # DeepSpeed's own Adam rounds in other places than torch's: 4.4e-6 where a gradient is that small
    torch.testing.assert_close(two["trained"], expected, rtol=0, atol=1e-5 if changes is OFFLOADED else 1e-6)

    assert two["resumed"] == two["losses"]
    assert two["frozen"] == (True, 27)
    assert two["odd_state"]
    assert len(read_metrics(tmp_path / "two" / "metrics.jsonl")) == 7  # the main process alone wrote them

    base = audio_llm()
    base.model.audio_tower = PassThroughTower()
    loaded = PeftModel.from_pretrained(base, tmp_path / "two" / "adapter")
    adapter = {name: value for name, value in loaded.named_parameters() if name in expected}
    torch.testing.assert_close(adapter, two["trained"], rtol=0, atol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "every", "changes"),
    [
        ("ddp_cpu", 2, {}),
        ("fsdp2_cpu", 1, {}),
        pytest.param("fsdp2_cpu", 1, FROM_META, id="fsdp2_from_meta"),
        pytest.param("deepspeed_zero2_cpu", 2, {}, marks=needs_deepspeed, id="zero2"),
        pytest.param("deepspeed_zero3_cpu", 1, {}, marks=needs_deepspeed, id="zero3"),
    ],
)
def test_two_processes_distill_as_one(
    content: dict[str, Any],
    tmp_path: Path,
    condft_trainee: Any,
    data: Any,
    engine: str,
    every: int,
    changes: dict[str, Any],
) -> None:
    """No stage 1 here, so that with `every` 1 the run's first forwards are those of a step with self-distillation."""
    content["training"] |= {"per_device_batch_size": 1, "gradient_accumulation_steps": 4, "checkpoint_every": 2}
    content["training"] |= {"projector_steps": 0, "steps": 7}
    content["training"]["self_distillation"] = {"every": every, "per_device_batch_size": 1, "weight": 10.0}
    two = launch(engine, tmp_path, divided(content, tmp_path, 2), changes=changes)
    (losses,), expected = train_alone(content, condft_trainee(), data, cpu=True)
    assert losses == pytest.approx(two["losses"][0], rel=1e-6)
    torch.testing.assert_close(two["trained"], expected, rtol=0, atol=1e-6)
    assert two["resumed"] == two["losses"]
    assert two["frozen"] == (True, 27)
    ours, theirs = (
        {
            line["step"]: line["self_distillation_kl"]
            for line in read_metrics(folder / "metrics.jsonl")
            if "self_distillation_kl" in line
        }
        for folder in (tmp_path / "two", tmp_path / "run")
    )
    assert list(ours) == list(range(every, 8, every))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "processes", "changes"),
    [
        pytest.param("ddp", 2, {}, marks=needs_two_gpus),
        pytest.param("fsdp2", 2, {}, marks=needs_two_gpus),
        pytest.param("deepspeed_zero2", 2, {}, marks=[needs_deepspeed, needs_two_gpus]),
        pytest.param("deepspeed_zero3", 2, {}, marks=[needs_deepspeed, needs_two_gpus]),
        pytest.param("deepspeed_zero2", 1, OFFLOADED, marks=[needs_deepspeed, needs_gpu], id="zero2_adam"),
        pytest.param("deepspeed_zero3", 1, OFFLOADED, marks=[needs_deepspeed, needs_gpu], id="zero3_adam"),
    ],
)
def test_on_gpus(
    content: dict[str, Any],
    tmp_path: Path,
    condft_trainee: Any,
    data: Any,
    engine: str,
    processes: int,
    changes: dict[str, Any],
) -> None:
    """As on the CPU, over NCCL; and with the optimizer's state and its step on the CPU (DeepSpeed's own Adam)."""
    content["training"] |= {"checkpoint_every": 2, "per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    changes = changes | {"num_processes": processes}
    found = launch(engine, tmp_path, divided(content, tmp_path, processes), device="cuda", changes=changes)
    assert (found["processes"], found["frozen"], found["odd_state"]) == (processes, (True, 27), True)
    losses, expected = train_alone(content, condft_trainee().cuda(), data, cpu=False)
    # never measured: a product on a GPU may add in another order for each shape
    for ours, theirs, resumed in zip(losses, found["losses"], found["resumed"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert resumed == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(found["trained"], expected, rtol=0, atol=1e-5)


def test_meta_weights_that_nothing_fills_are_refused(make_config: Any, condft_trainee: Any, data: Any) -> None:
    config = make_config()
    with torch.device("meta"):
        model = condft_trainee()
    with pytest.raises(ValueError, match=r"on the meta device of this process.*fsdp_cpu_ram_efficient_load"):
        train(make_engine(make_accelerator(config, cpu=True)), model, *data, config)
