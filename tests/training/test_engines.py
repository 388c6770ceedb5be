"""Two processes train to the weights of one, on every engine that runs on a CPU; a cut-off run resumes to the same."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from condft.multimodal import PassThroughTower
from condft.training import RunConfig, find_checkpoint, make_accelerator, prepare_output_dir, read_metrics, train
from condft.training.checkpoint import load_trained

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")


def launch(engine: str, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    config, target = folder / f"{engine}.yaml", folder / f"{engine}.pt"
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    command += ["--main_process_port", "0", str(Path(__file__).with_name("train_on_rank.py"))]
    done = subprocess.run(
        [*command, str(config), str(target)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(target, weights_only=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "kind", "tensors"),
    [
        ("ddp_cpu", "MULTI_CPU", "Tensor"),
        ("fsdp2_cpu", "FSDP", "DTensor"),
        pytest.param("deepspeed_zero2_cpu", "DEEPSPEED", "Tensor", marks=needs_deepspeed),
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
) -> None:
    """4 clips on one process, 2 on each of two in two micro-batches: the same losses, weights and adapter."""
    content["training"]["checkpoint_every"] = 2
    divided = content["training"] | {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}
    two = launch(engine, tmp_path, content | {"training": divided, "output_dir": str(tmp_path / "two")})
    assert (two["engine"], two["processes"], two["sharded"]) == (f"DistributedType.{kind}", 2, [tensors])

    config, model = RunConfig.model_validate(content), condft_trainee()
    prepare_output_dir(config.output_dir)
    one = train(make_accelerator(config, cpu=True), model, *data, config)
    for ours, theirs in zip([result.losses for result in one], two["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    checkpoint = find_checkpoint(config, num_processes=1)
    assert checkpoint is not None
    expected = load_trained(checkpoint)
    torch.testing.assert_close(two["trained"], expected, rtol=0, atol=2e-6)

    assert two["resumed"] == two["losses"]
    assert two["frozen"] == (True, 27)
    assert len(read_metrics(tmp_path / "two" / "metrics.jsonl")) == 7  # the main process alone wrote them

    base = audio_llm()
    base.model.audio_tower = PassThroughTower()
    loaded = PeftModel.from_pretrained(base, tmp_path / "two" / "adapter")
    adapter = {name: value for name, value in loaded.named_parameters() if name in expected}
    torch.testing.assert_close(adapter, two["trained"], rtol=0, atol=0)
