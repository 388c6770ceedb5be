"""The tuner on several ranks without our trainer: plain FSDP2 and FSDP1 train, disable, save, load as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from tests.tuner.fsdp_on_rank import TOKENS, build_tuned, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of two gloo ranks found; one launch for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).with_name("fsdp_on_rank.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def part(results: dict[str, torch.Tensor], engine: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{engine}/"): value for name, value in results.items() if name.startswith(engine)}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"), [("fsdp2", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-2)]
)
def test_sharded_training_is_training(
    ranks: list[dict[str, torch.Tensor]], engine: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Also of fp32 copies over a bf16 base, where a step of AdamW turns rounding of small gradients into 1e-2."""
    model = build_tuned(dtype)
    with torch.no_grad():
        base = model(input_ids=TOKENS).logits
    train(model, TOKENS)
    expected = get_peft_model_state_dict(model)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    for results in ranks:
        found = part(results, engine)
        adapter = {name: value for name, value in found.items() if "condft_weight" in name}
        assert {name: value.dtype for name, value in adapter.items()} == dict.fromkeys(expected, torch.float32)
        torch.testing.assert_close(adapter, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=10 * tolerance)
        assert not torch.equal(found["logits"], base)
        torch.testing.assert_close(found["disabled"], base, rtol=0, atol=tolerance)
        assert torch.equal(found["again"], found["logits"])  # the whole adapter, written into another sharded model

        loaded = build_tuned(dtype)
        set_peft_model_state_dict(loaded, adapter)
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=TOKENS).logits, found["logits"], rtol=0, atol=tolerance)


@pytest.mark.multiprocess
def test_fsdp1_with_original_parameters_has_the_same_forward_and_backward(
    ranks: list[dict[str, torch.Tensor]],
) -> None:
    model = build_tuned()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = [part(results, "fsdp1") for results in ranks]
    torch.testing.assert_close(torch.stack([each["loss"] for each in found]).mean(), loss.detach(), rtol=1e-6, atol=0)
    for each in found:
        torch.testing.assert_close(each["norm"], norm, rtol=1e-5, atol=0)
