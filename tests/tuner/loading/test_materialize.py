"""Ranks that hold only meta tensors choose what one process chooses, and train what another rank's values fill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from condft import CondFTConfig
from tests.helpers.processes import run_two
from tests.helpers.tiny_llama import build_tiny_llama
from tests.helpers.tiny_models import tiny_moe
from tests.workers.fsdp import TOKENS, train
from tests.workers.meta import build_tuned


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo ranks left what they found; one launch for all tests."""
    folder = tmp_path_factory.mktemp("meta_ranks")
    run_two("meta.py", folder)
    return folder


def told(folder: Path, key: str) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text())[key] for rank in range(2)]


@pytest.mark.multiprocess
def test_all_ranks_choose_what_one_process_chooses(ranks: Path) -> None:
    def chosen(model: Any, **options: Any) -> list[str]:
        return get_peft_model(model, CondFTConfig(**options)).peft_config["default"].target_units

    first, second = told(ranks, "choices")
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
def test_what_is_refused_is_refused_on_all_ranks(ranks: Path) -> None:
    first, second = told(ranks, "refusals")
    assert first == second
    assert "weights are on the meta device of every rank and cannot be analyzed" in first["nowhere"]
    assert "0 of 28 candidate weights have no row in it and 28 have other values" in first["other"]
    assert "'q_prj' is near q_proj" in first["no_match"]
    assert "model.embed_tokens.weight is tied to lm_head.weight" in first["tied"]


@pytest.mark.multiprocess
def test_the_first_ranks_values_fill_the_others_and_all_shards_train(ranks: Path) -> None:
    """accelerate alone would leave the optimizer of a meta rank without its parameters: see `materialize`."""
    model = build_tuned(0)
    before = {f"before/{name}": p.detach().clone() for name, p in model.named_parameters()}
    train(model, TOKENS)
    after = {f"after/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(after) == 1 + len(model.peft_config["default"].target_units)
    for rank in range(2):
        found = load_file(ranks / f"{rank}.safetensors")
        for name, value in before.items():
            assert torch.equal(found[name], value), name
        for name, value in after.items():
            # two steps of AdamW at 1e-2 over a bf16 base, whose rounding flips some of the signs that a step takes
            moved = (found[name] - found[name.replace("after", "before")]).abs()
            assert (moved > 1e-3).float().mean() > 0.9, name
            assert (found[name] - value).abs().mean() < 2e-3, name


def test_in_a_single_process_meta_weights_stay_where_they_are() -> None:
    with torch.device("meta"):
        model = build_tiny_llama()
    tuned = get_peft_model(model, CondFTConfig(target_units=["model.layers.0.self_attn.q_proj.weight"]))
    assert all(parameter.is_meta for parameter in tuned.parameters() if parameter.requires_grad)
