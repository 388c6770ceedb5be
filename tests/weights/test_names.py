"""A unit has one name, with and without wrappers, and one module type in all layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from condft.weights.names import WRAPPER_PARTS, canonical_name, module_type_of

parts = st.lists(st.sampled_from(["model", "layers", "3", "17", "q_proj", "v2", "weight"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight"),
        ("_orig_mod.model.layers.0.q.base_layer.weight", "model.layers.0.q.weight"),
        ("base_model.model._orig_mod.embed.original_module.weight", "embed.weight"),
        ("", ""),
    ],
)
def test_wrappers_leave_no_trace(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


@given(parts, st.lists(st.tuples(st.integers(0, 6), st.sampled_from(sorted(WRAPPER_PARTS))), max_size=3))
def test_wrappers_anywhere_change_nothing_and_twice_is_once(names: list[str], wrappers: list[tuple[int, str]]) -> None:
    wrapped = list(names)
    for place, wrapper in wrappers:
        wrapped.insert(place, wrapper)
    assert canonical_name(".".join(wrapped)) == ".".join(names)
    assert canonical_name(canonical_name(".".join(wrapped))) == ".".join(names)


def test_a_wrapped_model_has_the_names_of_the_plain_one(tiny_llama) -> None:
    plain = [name for name, _ in tiny_llama().named_parameters()]
    wrapped = torch.compile(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    found = [canonical_name(name) for name, _ in wrapped.named_parameters() if "lora_" not in name]
    assert [name.removeprefix("base_model.model.") for name in found] == plain


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.17.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("h.0", "h.*"),
        ("layers.3.experts.12.w1", "layers.*.experts.*.w1"),
        ("conv2d.k3", "conv2d.k3"),
        ("", ""),
    ],
)
def test_indices_are_replaced_and_digits_in_names_are_not(path: str, kind: str) -> None:
    assert module_type_of(path) == kind
