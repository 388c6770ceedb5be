"""`nn.MultiheadAttention`, whose weights are read by attribute, also past its own forward."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig

WEIGHTS = ["attn.in_proj_weight", "attn.out_proj.weight"]


class Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.width = options.get("kdim", 8)

    def forward(self, x: Tensor) -> Tensor:
        keys = x if self.width == 8 else torch.cat([x, x], dim=-1)[..., : self.width]
        result: Tensor = self.attn(x, keys, keys, need_weights=False)[0]
        return result


def built(**options: Any) -> Attending:
    torch.manual_seed(0)
    model = Attending(**options).eval()
    nn.init.normal_(model.attn.in_proj_bias)
    nn.init.normal_(model.attn.out_proj.bias)
    return model


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), CondFTConfig(**options))


@pytest.mark.parametrize("units", [WEIGHTS[:1], WEIGHTS[1:], WEIGHTS])
@pytest.mark.parametrize("bias", ["none", "selected"])
def test_trains_as_the_same_weights_unfrozen(units: list[str], bias: str) -> None:
    base = built()
    model = adapted(base, target_units=units, bias=bias)
    moving = [base.get_parameter(name) for name in units]
    if bias == "selected":
        moving += [base.get_parameter(name.replace("weight", "bias")) for name in units]
    for parameter in base.parameters():
        parameter.requires_grad = any(parameter is each for each in moving)
    with torch.no_grad():
        reference = base(X)
        assert torch.equal(model(X), reference)
    for each, parameters in ((base, moving), (model, [p for p in model.parameters() if p.requires_grad])):
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        for _ in range(2):
            each(X).square().sum().backward()
            optimizer.step()
            each.zero_grad()
    with torch.no_grad():  # where torch takes its fast path
        assert torch.equal(model(X), base(X))
        assert not torch.equal(model(X), reference)
        with model.disable_adapter():
            assert torch.equal(model(X), reference)
        model.merge_adapter()
        assert torch.equal(model(X), base(X))
        model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    assert all(torch.equal(p, dict(base.named_parameters())[n]) for n, p in merged.named_parameters())


def test_projections_of_different_widths() -> None:
    base = built(kdim=6, vdim=6)
    model = adapted(base, target_modules=["attn"], num_tensors=4, bias="selected")
    assert model.peft_config["default"].target_units == [
        "attn.k_proj_weight",
        "attn.out_proj.weight",
        "attn.q_proj_weight",
        "attn.v_proj_weight",
    ]
    only_k = adapted(base, target_units=["attn.k_proj_weight"], bias="selected")
    shapes = {n.split(".")[-2]: tuple(p.shape) for n, p in only_k.named_parameters() if p.requires_grad}
    assert shapes == {"condft_k_proj_weight": (8, 6), "condft_in_proj_bias": (8,)}
    only_k(X).square().sum().backward()
    base(X).square().sum().backward()
    grads = {n.split(".")[-2]: p.grad for n, p in only_k.named_parameters() if p.requires_grad}
    torch.testing.assert_close(grads["condft_k_proj_weight"], base.attn.k_proj_weight.grad)
    torch.testing.assert_close(grads["condft_in_proj_bias"], base.attn.in_proj_bias.grad[8:16])


def test_it_is_a_candidate_and_asked_for_by_module() -> None:
    base = built()
    assert adapted(base, num_tensors=1).peft_config["default"].target_units is not None
    for scope, expected in ((["attn"], WEIGHTS), (["out_proj"], WEIGHTS[1:]), (["in_proj_weight"], WEIGHTS[:1])):
        assert adapted(base, target_modules=scope).peft_config["default"].target_units == expected


def test_slices_of_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MultiheadAttention's weights cannot be sliced: name 'attn.in_proj_weight'"):
        adapted(built(), target_units=["attn.in_proj_weight[q0]"])


@pytest.mark.parametrize(
    "unit", ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_encoders_fast_path_does_not_pass_it_by(unit: str, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.Sequential()
    base.add_module("encoder", nn.TransformerEncoder(layer, 2))
    model = adapted(base.eval(), target_units=[f"encoder.layers.0.{unit}"], init_weights=False).eval()
    mask = torch.tensor([[False, False, False], [False, False, True]]) if padded else None

    def outputs(each: Any) -> Tensor:
        encoder = each.base_model.model.encoder
        result: Tensor = encoder(X, src_key_padding_mask=mask)
        return result[~mask] if mask is not None else result

    with torch.no_grad():
        fast = outputs(model)
        with model.disable_adapter():
            assert not torch.allclose(outputs(model), fast, atol=1e-3)
    torch.testing.assert_close(fast, outputs(model).detach())
