"""The tuner under DeepSpeed ZeRO-3 on two processes: trains, disables, merges and saves as one process does."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from condft import CondFTConfig
from tests.helpers.marks import needs_deepspeed
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, tiny_moe, trainable
from tests.helpers.processes import run_two
from tests.workers.fsdp import PARTS, TOKENS, UNITS, build_tuned, train


@pytest.mark.multiprocess
@needs_deepspeed
def test_partitioned_training_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # its compiled operation: a process that was killed while it compiled leaves a lock, for which all others wait
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    run_two("zero3.py", tmp_path, timeout=500)
    for kind in ("dense", "parts", "init"):
        model = get_peft_model(tiny_moe(), CondFTConfig(target_units=PARTS)) if kind == "parts" else build_tuned()
        train(model, TOKENS)
        weights = {name: parameter.detach() for name, parameter in trainable(model).items()}
        assert len(weights) == (len(PARTS) - 1 if kind == "parts" else len(UNITS))  # two experts are of one stack
        for rank in range(2):
            found = load_file(tmp_path / f"{kind}-{rank}.safetensors")
            ours = {name.removeprefix("weights/"): value for name, value in found.items() if "/" in name}
            # of experts too: AdamW's first steps lift the rounding of their smallest gradients to 1.4e-5
            torch.testing.assert_close(ours, weights, rtol=0, atol=3e-5 if kind == "parts" else 1e-6)
            torch.testing.assert_close(found["acting"], logits(model, TOKENS), rtol=0, atol=1e-5)
            with model.disable_adapter():
                torch.testing.assert_close(found["disabled"], logits(model, TOKENS), rtol=0, atol=1e-6)
            assert not torch.equal(found["acting"], found["disabled"])
            assert all(torch.equal(found[state], found["acting"]) for state in ("merged", "unmerged", "plain"))

            # the adapter that was saved is whole: read in this process, where nothing is partitioned
            base = tiny_moe() if kind == "parts" else build_tiny_llama(layers=2)
            loaded = PeftModel.from_pretrained(base, tmp_path / f"adapter-{kind}", is_trainable=True)
            assert trainable(loaded).keys() == ours.keys()
            assert all(torch.equal(value, ours[name]) for name, value in trainable(loaded).items())
            torch.testing.assert_close(logits(loaded, TOKENS), found["acting"], rtol=0, atol=1e-6)
