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

from condft.multimodal import PassThroughTower
from condft.training import RunConfig, find_checkpoint, make_accelerator, prepare_output_dir, read_metrics, train
from condft.training.checkpoint import load_trained
from tests.marks import needs_deepspeed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"


def launch(engine: str, folder: Path, content: dict[str, Any], *, efficient: bool = False) -> dict[str, Any]:
    config, target, launcher = folder / "config.yaml", folder / "result.pt", folder / "launcher.yaml"
    config.write_text(yaml.safe_dump(content))
    settings = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text())
    if efficient:
        settings["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = True
    launcher.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += ["--main_process_port", "0", str(Path(__file__).with_name("train_on_rank.py"))]
    done = subprocess.run(
        [*command, str(config), str(target)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(target, weights_only=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "kind", "tensors", "efficient"),
    [
        ("ddp_cpu", "MULTI_CPU", "Tensor", False),
        ("fsdp2_cpu", "FSDP", "DTensor", False),
        pytest.param("fsdp2_cpu", "FSDP", "DTensor", True, id="fsdp2_from_meta"),
        pytest.param("deepspeed_zero2_cpu", "DEEPSPEED", "Tensor", False, marks=needs_deepspeed),
        pytest.param("deepspeed_zero3_cpu", "DEEPSPEED", "partition", False, marks=needs_deepspeed),
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
    efficient: bool,
) -> None:
    """4 clips a step, one a micro-batch, on one process or two on each of two: the same losses, weights and adapter.

    To 1e-6 in fp32 (measured: 2.4e-7), which is the order in which four gradients are added up. In one batch of four
    instead of four micro-batches, one process comes to other weights by 9.05e-7 at most (1.5e-6 on another CPU): a
    matrix product over four clips adds in another order than four products, and AdamW's first step hardly tells a
    gradient of 1.4e-6 from one of 3e-2. It is so for the same tensors unfrozen by hand in plain PyTorch as well, to
    the last digit: see test_ranks.
    """
    content["training"] |= {"checkpoint_every": 2, "per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    divided = content["training"] | {"gradient_accumulation_steps": 2}
    two = launch(
        engine, tmp_path, content | {"training": divided, "output_dir": str(tmp_path / "two")}, efficient=efficient
    )
    assert (two["engine"], two["processes"], two["sharded"]) == (f"DistributedType.{kind}", 2, [tensors])

    config, model = RunConfig.model_validate(content), condft_trainee()
    prepare_output_dir(config.output_dir)
    one = train(make_accelerator(config, cpu=True), model, *data, config)
    for ours, theirs in zip([result.losses for result in one], two["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    checkpoint = find_checkpoint(config, num_processes=1)
    assert checkpoint is not None
    expected = load_trained(checkpoint)
    torch.testing.assert_close(two["trained"], expected, rtol=0, atol=1e-6)

    assert two["resumed"] == two["losses"]
    assert two["frozen"] == (True, 27)
    assert two["odd_state"]
    assert len(read_metrics(tmp_path / "two" / "metrics.jsonl")) == 7  # the main process alone wrote them

    base = audio_llm()
    base.model.audio_tower = PassThroughTower()
    loaded = PeftModel.from_pretrained(base, tmp_path / "two" / "adapter")
    adapter = {name: value for name, value in loaded.named_parameters() if name in expected}
    torch.testing.assert_close(adapter, two["trained"], rtol=0, atol=0)


def test_meta_weights_that_nothing_fills_are_refused(make_config: Any, condft_trainee: Any, data: Any) -> None:
    config = make_config()
    with torch.device("meta"):
        model = condft_trainee()
    with pytest.raises(ValueError, match=r"weights are on the meta device of this rank.*fsdp_cpu_ram_efficient_load"):
        train(make_accelerator(config, cpu=True), model, *data, config)
