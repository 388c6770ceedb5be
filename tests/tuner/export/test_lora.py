"""The LoRA of an adapter loads without condft, and its error is what the singular values say."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from condft import CondFTConfig
from condft.tuner import export_delta, export_lora
from tests.helpers.models.adapters import EVERYTHING
from tests.helpers.models.tiny_models import logits


def test_lora_at_full_rank_has_the_same_logits(adapter: Any, tiny_llama: Any, token_ids: Any, tmp_path: Path) -> None:
    model = adapter(base=tiny_llama(tied=False), lr=0.1, **EVERYTHING)
    export = export_lora(model, tmp_path / "lora", rank=64)
    assert all(row.rank == row.full_rank and row.relative_error < 1e-5 for row in export.factors)
    loaded = PeftModel.from_pretrained(tiny_llama(tied=False), tmp_path / "lora")
    assert (logits(loaded, token_ids) - logits(model, token_ids)).abs().max() < 1e-5
    merged = loaded.merge_and_unload()
    assert (logits(merged, token_ids) - logits(model, token_ids)).abs().max() < 1e-5


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "conv1d_of_transformers": (lambda: Conv1D(4, 6), lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.randint(0, 9, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), lambda: torch.randn(2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2), lambda: torch.randn(2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), lambda: torch.randn(2, 2, 8, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_lora_of_every_layer_kind(kind: str, tmp_path: Path) -> None:
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    base, x = nn.Sequential(make()), draw()
    model = get_peft_model(copy.deepcopy(base), CondFTConfig(target_modules=["0"], init_weights=False))
    export_lora(model, tmp_path, rank=100)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert not torch.allclose(base(x), model(x), atol=1e-3)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 31), st.integers(0, 5))
def test_the_error_falls_with_the_rank(adapter: Any, tmp_path: Path, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = adapter(num_tensors=2, steps=1)
    low, high = (export_lora(model, tmp_path / str(r), rank=r) for r in (rank, rank + 1))
    for less, more in zip(low.factors, high.factors, strict=True):
        assert more.relative_error <= less.relative_error + 1e-6
    assert high.relative_error <= low.relative_error + 1e-6


def test_the_rank_follows_the_error_asked_for(adapter: Any, tiny_llama: Any, token_ids: Any, tmp_path: Path) -> None:
    model = adapter(num_tensors=6)
    errors = {name: t.values for name, t in export_delta(model).tensors.items()}
    export = export_lora(model, tmp_path / "lora", max_error=0.3)
    assert len({row.rank for row in export.factors}) > 1
    for row in export.factors:
        tail = torch.linalg.svdvals(errors[row.name])
        assert row.relative_error <= 0.3 + 1e-6
        assert row.relative_error == pytest.approx((tail[row.rank :].norm() / tail.norm()).item(), abs=1e-5)
        assert row.rank == 1 or tail[row.rank - 1 :].norm() / tail.norm() > 0.3
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    ranks = {
        name.split(".lora_A")[0].removeprefix("base_model.model."): len(p)
        for name, p in loaded.named_parameters()
        if ".lora_A" in name
    }
    assert ranks == {row.name.removesuffix(".weight"): row.rank for row in export.factors}
    scalings = {m.scaling["default"] for m in loaded.modules() if isinstance(m, LoraLayer)}
    assert scalings == {1.0}


def test_the_errors_are_in_the_card_and_the_file(adapter: Any, tmp_path: Path) -> None:
    model = adapter(num_tensors=4)
    export = export_lora(model, tmp_path / "lora", rank=2, dtype=torch.bfloat16)
    card = (tmp_path / "lora" / "README.md").read_text()
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as opened:
        summary = json.loads(opened.metadata()["condft_lora"])
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert summary["relative_error"] == export.relative_error
    for row in export.factors:
        assert f"| {row.name} | 2 | {row.full_rank} | {row.relative_error:.4f} |" in card
        assert summary["weights"][row.name] == {"rank": 2, "relative_error": row.relative_error}
    assert (tmp_path / "lora" / "adapter_config.json").exists()


def test_the_lora_loads_where_condft_is_not_imported(adapter: Any, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    export_lora(adapter(base=tiny_llama().from_pretrained(tmp_path / "base")), tmp_path / "lora", rank=4)
    code = (
        "import sys; from peft import AutoPeftModel as Auto;"
        f"model = Auto.from_pretrained({str(tmp_path / 'lora')!r});"
        "assert 'condft' not in sys.modules; print(model.peft_config['default'].peft_type.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "LORA", done.stderr[-2000:]


def test_names_that_other_modules_end_in_are_matched_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"lin": nn.Linear(3, 3), "sub": nn.ModuleDict({"lin": nn.Linear(3, 3)})})
    model = get_peft_model(copy.deepcopy(base), CondFTConfig(target_units=["lin.weight"], init_weights=False))
    export_lora(model, tmp_path, rank=2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [n for n, _ in loaded.named_parameters() if "lora_A" in n] == ["base_model.model.lin.lora_A.default.weight"]


def test_weights_without_a_lora_form_are_listed(tmp_path: Path) -> None:
    base = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, groups=2), "up": nn.Linear(4, 4), "still": nn.Linear(4, 4)})
    config = CondFTConfig(target_modules=["conv", "up", "still"], num_tensors=3, init_weights=False)
    model = get_peft_model(base, config)
    base["still"].condft_weight["default"].data.copy_(base["still"].base_layer.weight)
    export = export_lora(model, tmp_path, rank=4)
    assert [row.name for row in export.factors] == ["up.weight"]
    assert export.left_out == {
        "conv.weight": "PEFT's LoRA cannot merge a convolution of 2 groups",
        "still.weight": "unchanged",
    }
    assert 0.1 < export.relative_error < 1
    assert "Left out: conv.weight (PEFT's LoRA" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either rank or max_error"),
        ({"rank": 2, "max_error": 0.1}, "either rank or max_error"),
        ({"rank": 0}, "at least rank 1"),
        ({"max_error": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_bad_choices_of_the_rank(adapter: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_lora(adapter(num_tensors=2), tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_an_untrained_adapter_has_no_lora(tiny_llama: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=2))
    with pytest.raises(ValueError, match="none of the 2 selected weights has a LoRA form"):
        export_lora(model, tmp_path / "lora", rank=1)
