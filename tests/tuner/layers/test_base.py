"""What every wrapper does: attributes of its module, copies by adapter, and refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.layers.functional import FunctionalLayer
from condft.tuner.layers.slices import Slices

ROWS = Slices(0, ((1, 3),))


def build(parts: Any = None, **options: Any) -> FunctionalLayer:
    torch.manual_seed(0)
    return FunctionalLayer(nn.Linear(6, 4), "default", parts or {"weight": None}, **options)


def test_copies_start_as_the_base_and_are_other_memory() -> None:
    layer = build({"weight": ROWS, "bias": None})
    base = layer.get_base_layer()
    assert torch.equal(layer.copies_of("weight")["default"], base.weight[1:3])
    assert torch.equal(layer.copies_of("bias")["default"], base.bias)
    assert layer.copies_of("bias")["default"].data_ptr() != base.bias.data_ptr()
    assert layer.adapter_layer_names == ("condft_weight", "condft_bias")
    assert [(name, slices) for name, slices, _ in layer.parts_of("default")] == [("weight", ROWS), ("bias", None)]
    assert (layer.trains("default"), layer.trains("other")) == (True, False)


@given(st.integers(0, 1000))
def test_init_weights_false_adds_noise_of_a_tenth_of_the_spread(seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(64, 64)
    layer = FunctionalLayer(base, "default", {"weight": None}, init_weights=False)
    noise = layer.copies_of("weight")["default"] - base.weight
    assert (noise.std() / base.weight.std()).item() == pytest.approx(0.1, rel=0.1)


def test_weight_and_bias_are_those_in_effect() -> None:
    layer = build({"weight": ROWS, "bias": None}, init_weights=False)
    base = layer.get_base_layer()
    assert torch.equal(layer.weight[1:3], layer.copies_of("weight")["default"])
    assert torch.equal(layer.weight[[0, 3]], base.weight[[0, 3]])
    assert torch.equal(layer.bias, layer.copies_of("bias")["default"])
    layer.enable_adapters(False)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def test_features_are_those_of_the_module() -> None:
    layer = build()
    assert (layer.in_features, layer.out_features) == (6, 4)
    convolution = FunctionalLayer(nn.Conv1d(3, 5, 2, stride=2), "default", {"weight": None})
    assert (convolution.in_features, convolution.out_features, convolution.stride) == (3, 5, (2,))
    assert repr(layer).startswith("condft.FunctionalLayer(")


def test_two_active_adapters_of_one_weight_are_refused() -> None:
    layer = build()
    layer.update_layer("second", {"weight": None})
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active together"):
        layer(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"cannot merge \['default', 'second'\]"):
        layer.merge()
    layer.set_adapter("second")
    layer.merge()
    with pytest.raises(ValueError, match=r"holds \['second'\] merged adapters"):
        layer.merge(adapter_names=["default"])


def test_a_deleted_adapter_leaves_nothing_behind() -> None:
    layer = build()
    layer.update_layer("second", {"weight": ROWS}, offload_base=True)
    layer.delete_adapter("second")
    assert not layer.trains("second")
    assert list(layer.copies_of("weight")) == ["default"]
    layer.update_layer("second", {"weight": None})  # the name is free
    assert layer.copies_of("weight")["second"].shape == (4, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = build()
    with torch.no_grad():
        layer.copies_of("weight")["default"][0, 0] = value
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


def test_unmerging_twice_warns() -> None:
    layer = build()
    layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_move_keeps_the_copies_dtype() -> None:
    """PEFT's own method casts them to the base's dtype, and fp32 copies over bf16 would lose their bits."""
    layer: CondFTLayer = FunctionalLayer(nn.Linear(6, 4).bfloat16(), "default", {"weight": None})
    copied = layer.copies_of("weight")["default"]
    copied.data = copied.data.float() + 1e-4
    before = copied.detach().clone()
    layer._move_adapter_to_device_of_base_layer("default")
    assert torch.equal(layer.copies_of("weight")["default"], before)
