"""Processes that hold only meta tensors choose the same units as one process, and train the first process's values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from condft import CondFTConfig
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe
from tests.helpers.processes import run_two
from tests.workers.fsdp import TOKENS, train
from tests.workers.meta import build_tuned


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two gloo processes wrote their results; one launch for all tests."""
    folder = tmp_path_factory.mktemp("meta_processes")
    run_two("meta.py", folder)
    return folder


def found(folder: Path, key: str) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text())[key] for rank in range(2)]


@pytest.mark.multiprocess
def test_all_processes_choose_what_one_process_chooses(results_folder: Path) -> None:
    def chosen(model: Any, **options: Any) -> list[str]:
        return get_peft_model(model, CondFTConfig(**options)).peft_config["default"].target_units

    first, second = found(results_folder, "choices")
    assert first == second
    assert first == {
        "lowest": chosen(build_tiny_llama(), num_tensors=6),
        "fraction": chosen(build_tiny_llama(), trainable_fraction=0.2, score="entropy_deficit"),
        "heads": chosen(build_tiny_llama(), granularity="head", num_tensors=9),
        "experts": chosen(tiny_moe(), num_tensors=5),
        "random": chosen(build_tiny_llama(), order="random", seed=0, num_tensors=5),
        "report": chosen(build_tiny_llama(), num_tensors=7),
    }


@pytest.mark.multiprocess
def test_what_is_refused_is_refused_in_all_processes(results_folder: Path) -> None:
    first, second = found(results_folder, "refusals")
    assert first == second
    assert "weights are on the meta device of every process and cannot be analyzed" in first["nowhere"]
    assert "0 of 28 candidate weights have no row in it and 28 have other values" in first["other"]
    assert "'q_prj' is near q_proj" in first["no_match"]
    assert "model.embed_tokens.weight is tied to lm_head.weight" in first["tied"]


@pytest.mark.multiprocess
def test_the_first_processs_values_fill_the_others_and_all_shards_train(results_folder: Path) -> None:
    """accelerate alone would lose the optimizer's parameters: see `condft.tuner.patches.meta_parameters`."""
    model = build_tuned(0)
    before = {f"before/{name}": p.detach().clone() for name, p in model.named_parameters()}
    train(model, TOKENS)
    after = {f"after/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(after) == 1 + len(model.peft_config["default"].target_units)
    for rank in range(2):
        results = load_file(results_folder / f"{rank}.safetensors")
        for name, value in before.items():
            assert torch.equal(results[name], value), name
        for name, value in after.items():
            # two steps of AdamW at 1e-2 over a bf16 base, whose rounding flips some of the signs that a step takes
            moved = (results[name] - results[name.replace("after", "before")]).abs()
            assert (moved > 1e-3).float().mean() > 0.9, name
            assert (results[name] - value).abs().mean() < 2e-3, name
