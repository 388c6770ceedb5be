"""base + difference is the merged model, and a weighted sum of differences merges adapters."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from condft.tuner import Delta, apply_delta, combine_deltas, export_delta
from condft.tuner.export.updates import iter_updates
from tests.helpers.models.adapters import EVERYTHING


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
    assert same_state(base, tiny_llama())  # unchanged, and without the adapter
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
    with pytest.raises(ValueError, match=r"6 of 6 .*: bfloat16 in the model, float32 in the difference"):
        apply_delta(tiny_llama().bfloat16(), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"tensors differ, .*: absent in the model"):
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
