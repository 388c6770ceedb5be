"""Layers of one weight compute with the copy what the same layer with that weight would, and train as it would."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from condft.tuner.layers.functional import FunctionalLayer
from condft.tuner.layers.slices import Slices

LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "transformers' Conv1D": (lambda: Conv1D(4, 6), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding_mode="circular", padding=1), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, dilation=2), (2, 2, 8, 8, 8)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), None),
}


def pair(kind: str, parts: Any, dtype: torch.dtype = torch.float32) -> tuple[FunctionalLayer, nn.Module, Tensor]:
    """A wrapper with perturbed copies, the same layer with these values in its own parameters, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    base = make().to(dtype)
    layer = FunctionalLayer(base, "default", parts, init_weights=False)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, slices, values in layer.parts_of("default"):
            own = plain.get_parameter(parameter)
            own.copy_(values) if slices is None else slices.write(own, values)
    x = torch.randint(9, (3, 5)) if shape is None else torch.randn(shape).to(dtype)
    return layer, plain, x


@pytest.mark.parametrize("kind", LAYERS)
def test_the_whole_weight(kind: str) -> None:
    layer, plain, x = pair(kind, {"weight": None})
    result, expected = layer(x), plain(x)
    assert torch.equal(result, expected)
    for each in (result, expected):
        each.square().sum().backward()
    torch.testing.assert_close(layer.copies_of("weight")["default"].grad, plain.weight.grad)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert not torch.allclose(layer(x), expected)


@settings(max_examples=40)
@given(st.sampled_from(["linear", "linear without bias", "transformers' Conv1D"]), st.data())
def test_some_rows_or_columns(kind: str, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, 1))
    size = LAYERS[kind][0]().weight.shape[dim]
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    slices = Slices.joined(dim, [(index, index + 1) for index in indices])
    layer, plain, x = pair(kind, {"weight": slices})
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    result, expected = layer(one), plain(other)
    torch.testing.assert_close(result, expected)
    for each in (result, expected):
        each.square().sum().backward()
    grad = layer.copies_of("weight")["default"].grad
    assert grad is not None
    torch.testing.assert_close(grad, slices.take(plain.weight.grad))
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_fp32_copies_over_a_bf16_base_compute_in_bf16(kind: str) -> None:
    layer, plain, x = pair(kind, {"weight": None}, torch.bfloat16)
    copied = layer.copies_of("weight")["default"]
    copied.data = copied.data.float()
    result = layer(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, plain(x))
    result.float().square().sum().backward()
    assert copied.grad is not None
    assert copied.grad.dtype == torch.float32


@pytest.mark.parametrize(("kind", "slices"), [("linear", None), ("linear", Slices(0, ((1, 3),))), ("conv1d", None)])
def test_autocast_chooses_the_dtype(kind: str, slices: Slices | None) -> None:
    layer, plain, x = pair(kind, {"weight": slices})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = layer(x), plain(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    result.float().sum().backward()
    assert layer.copies_of("weight")["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("slices", [None, Slices(0, ((1, 3),))])
def test_a_bias_trains_with_its_rows(slices: Slices | None) -> None:
    layer, plain, x = pair("linear", {"weight": slices, "bias": slices})
    result, expected = layer(x), plain(x)
    torch.testing.assert_close(result, expected)
    for each in (result, expected):
        each.square().sum().backward()
    grad = plain.bias.grad if slices is None else slices.take(plain.bias.grad)
    torch.testing.assert_close(layer.copies_of("bias")["default"].grad, grad)
