"""base + difference is the merged model; the LoRA of an adapter loads without condft and says what it lost."""

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
from condft.tuner import Delta, apply_delta, combine_deltas, export_delta, export_lora
from condft.tuner.export.updates import iter_updates
from tests.helpers.tiny_models import logits

EVERYTHING = {
    "num_tensors": 5,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [33, 80]},
}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_and_difference_are_the_merged_model(tiny_llama: Any, adapter: Any, tmp_path: Path, dtype: Any) -> None:
    """Bit for bit where the weight stayed within a factor of 2 of its base, within a rounding where it did not."""
    base = tiny_llama(tied=False).to(dtype)
    model = adapter(base=tiny_llama(tied=False).to(dtype), lr=1e-2, **EVERYTHING)
    trained = {update.name: update for update in iter_updates(model)}
    export_delta(model, tmp_path / "delta.safetensors")
    merged = model.merge_and_unload().state_dict()
    rebuilt = apply_delta(tiny_llama(tied=False).to(dtype), tmp_path / "delta.safetensors").state_dict()
    assert len(trained) == 7
    for name, before in base.state_dict().items():
        ratio = merged[name].float() / before.float()
        near = ((ratio > 0.51) & (ratio < 1.99)) | (merged[name] == before)
        assert torch.equal(rebuilt[name][near], merged[name][near]), name
        assert near.float().mean() > 0.9
        assert torch.allclose(rebuilt[name], merged[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-7), name
        assert torch.equal(merged[name], before) == (name not in trained)


@settings(max_examples=200)
@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=2), st.floats(-3, 3, width=32))
def test_the_difference_rounds_once_at_most(pair: list[float], factor: float) -> None:
    base, trained = torch.tensor(pair)[:, None]
    difference = trained - base
    rebuilt = base + difference
    bound = torch.finfo(torch.float32).eps * torch.maximum(base.abs(), difference.abs())
    assert (rebuilt - trained).abs() <= bound
    near = base * (1 + 0.16 * factor)  # within [1/2, 2] of the base: Sterbenz
    if abs(base) > 1e-30 and 0.5 <= near / base <= 2:
        assert torch.equal(base + (near - base), near)


def test_only_what_changed_is_in_the_file(adapter: Any, tiny_llama: Any, tmp_path: Path) -> None:
    model = adapter(base=tiny_llama(tied=False), **EVERYTHING)
    delta = export_delta(model, tmp_path / "delta.safetensors")
    tensors = load_file(tmp_path / "delta.safetensors")
    names = {*model.peft_config["default"].target_units, "lm_head.weight", "model.embed_tokens.weight"}
    assert delta.tensors.keys() == names
    assert tensors["model.embed_tokens.weight"].shape == (2, 32)
    assert tensors["model.embed_tokens.weight#index"].tolist() == [33, 80]
    dense = delta.state_dict()
    assert dense["model.embed_tokens.weight"].shape == (96, 32)
    with safe_open(tmp_path / "delta.safetensors", "pt") as opened:
        header = json.loads(opened.metadata()["condft_delta"])
    assert header["tensors"].keys() == names
    assert header["tensors"]["lm_head.weight"]["base_dtype"] == "float32"
    again = Delta.load(tmp_path / "delta.safetensors").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in dense.items())


@pytest.mark.parametrize("given_base", [True, False])
def test_from_the_folder_of_an_adapter(adapter: Any, tiny_llama: Any, tmp_path: Path, given_base: bool) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = tiny_llama().from_pretrained(tmp_path / "base")
    model = adapter(base=base)
    model.save_pretrained(tmp_path / "adapter")
    live = export_delta(model).state_dict()
    base = tiny_llama()
    stored = export_delta(tmp_path / "adapter", base=base if given_base else None)
    assert all(torch.equal(value, live[name]) for name, value in stored.state_dict().items())
    assert stored.tensors.keys() == live.keys()
    assert stored.base_model == str(tmp_path / "base")
    assert same_state(base, tiny_llama())  # handed back as it was, without the adapter
    assert all(p.requires_grad for p in base.parameters())


def test_half_the_weight_is_half_of_the_way(adapter: Any, tiny_llama: Any) -> None:
    model = adapter()
    delta = export_delta(model)
    half = apply_delta(tiny_llama(), delta, weight=0.5).state_dict()
    base, merged = tiny_llama().state_dict(), model.merge_and_unload().state_dict()
    assert all(torch.allclose(half[name], (base[name] + merged[name]) / 2, atol=1e-6) for name in base)


def test_a_weighted_sum_merges_adapters_of_different_selections(adapter: Any, tiny_llama: Any, tmp_path: Path) -> None:
    one, other = adapter(num_tensors=18), adapter(num_tensors=14, order="highest")
    first, second = export_delta(one), export_delta(other, tmp_path / "second.safetensors")
    combined = combine_deltas([first, tmp_path / "second.safetensors"], [0.25, 0.5])
    assert combined.tensors.keys() == first.tensors.keys() | second.tensors.keys()
    assert first.tensors.keys() & second.tensors.keys()  # some of them are in both
    merged, base = apply_delta(tiny_llama(), combined).state_dict(), tiny_llama().state_dict()
    for name, value in base.items():
        parts = [
            weight * delta.state_dict()[name]
            for delta, weight in ((first, 0.25), (second, 0.5))
            if name in delta.tensors
        ]
        assert torch.allclose(merged[name], value + sum(parts, torch.zeros(())), atol=1e-6), name
    with pytest.raises(ValueError, match="need as many weights"):
        combine_deltas([first], [1.0, 2.0])


def test_differences_of_two_bases_are_not_added(adapter: Any, tiny_llama: Any) -> None:
    units = ["model.layers.0.mlp.up_proj.weight"]
    one, other = (export_delta(adapter(base=tiny_llama(seed), target_units=units)) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"different bases: model.layers.0.mlp.up_proj.weight differs"):
        combine_deltas([one, other], [0.5, 0.5])


def test_another_base_is_refused_before_anything_changes(adapter: Any, tiny_llama: Any, tmp_path: Path) -> None:
    model = adapter(num_tensors=6)
    export_delta(model, tmp_path / "delta.safetensors")
    names = list(export_delta(model).tensors)
    changed = tiny_llama()
    with torch.no_grad():
        changed.get_parameter(names[-1])[0, 0] += 1e-3
    before = copy.deepcopy(changed)
    with pytest.raises(ValueError, match=rf"1 of 6 tensors differ, the first is {names[-1]}: other values"):
        apply_delta(changed, tmp_path / "delta.safetensors")
    assert same_state(changed, before)
    with pytest.raises(ValueError, match=r"6 of 6 tensors differ, .*: bfloat16 here, float32 there"):
        apply_delta(tiny_llama().bfloat16(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"tensors differ, .*: absent here"):
        apply_delta(tiny_llama(layers=1), tmp_path / "delta.safetensors")
    once = apply_delta(tiny_llama(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="6 of 6 tensors differ"):
        apply_delta(once, tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="apply the difference to the base model"):
        apply_delta(model, tmp_path / "delta.safetensors")


def test_damaged_and_foreign_files_are_refused(adapter: Any, tmp_path: Path) -> None:
    model = adapter(num_tensors=3)
    file = tmp_path / "delta.safetensors"
    export_delta(model, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short or no safetensors file"):
        Delta.load(file)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds no difference"):
        Delta.load(tmp_path / "adapter" / "adapter_model.safetensors")


def test_merged_missing_and_tied_are_refused(adapter: Any) -> None:
    model = adapter(num_tensors=3)
    with pytest.raises(ValueError, match=r"no adapter 'other' .* are \['default'\]"):
        export_delta(model, adapter_name="other")
    with pytest.raises(ValueError, match="holds its base already"):
        export_delta(model, base=model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        export_delta(model)
    tied = adapter(num_tensors=3, modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"tied to (model.embed_tokens|lm_head).weight"):
        export_delta(tied)


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


def test_the_errors_stand_in_the_card_and_the_file(adapter: Any, tmp_path: Path) -> None:
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


def test_what_lora_cannot_hold_is_listed(tmp_path: Path) -> None:
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
