"""A merge writes the copies into a module; the originals come back bit for bit, wherever the module is by then."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condft.tuner.layers.functional import FunctionalLayer
from condft.tuner.layers.slices import Slices

PARTS = {"whole": {"weight": None}, "rows": {"weight": Slices(0, ((1, 3),))}, "bias": {"weight": None, "bias": None}}


def build(parts: Any, dtype: torch.dtype = torch.float32) -> FunctionalLayer:
    torch.manual_seed(0)
    return FunctionalLayer(nn.Linear(6, 4).to(dtype), "default", parts, init_weights=False)


def state(layer: FunctionalLayer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.get_base_layer().state_dict().items()}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_restored(kind: str, dtype: torch.dtype) -> None:
    layer = build(PARTS[kind], dtype)
    before = state(layer)
    layer.merge()
    merged = state(layer)
    for parameter, slices, copy in layer.parts_of("default"):
        part = merged[parameter] if slices is None else slices.take(merged[parameter])
        assert torch.equal(part, copy)
        assert torch.equal(layer.base_values(parameter), before[parameter])
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {parameter for parameter, _, _ in layer.parts_of("default")}
    layer.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(layer).items())


def test_a_merge_shares_no_memory_with_the_copy() -> None:
    layer = build(PARTS["whole"])
    layer.merge()
    merged = state(layer)["weight"]
    with torch.no_grad():
        layer.copies_of("weight")["default"].zero_()
    assert torch.equal(state(layer)["weight"], merged)


@pytest.mark.parametrize("kind", ["whole", "rows"])
def test_a_module_that_was_cast_meanwhile_gets_its_originals_in_the_new_dtype(kind: str) -> None:
    layer = build(PARTS[kind])
    before = state(layer)
    layer.merge()
    layer.to(torch.float64)
    assert torch.equal(layer.base_values("weight"), before["weight"].double())
    layer.unmerge()
    assert torch.equal(state(layer)["weight"], before["weight"].double())
