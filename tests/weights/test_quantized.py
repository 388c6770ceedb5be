"""Quantized weights are dequantized to the values that act, or skipped by name; raw codes are never scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condft import analyze
from condft.report import Role, SkippedWeight, SkipReason
from condft.spectra import rounding_noise
from condft.weights.quantized import quantized_weight
from condft.weights.unit import Unit
from condft.weights.walk import iter_units


def walk(model: nn.Module) -> tuple[dict[str, Unit], dict[str, SkippedWeight]]:
    items = list(iter_units(model))
    units = {item.name: item for item in items if isinstance(item, Unit)}
    return units, {item.name: item for item in items if isinstance(item, SkippedWeight)}


def effective(layer: nn.Module, in_features: int) -> Tensor:
    """The matrix that a layer without bias applies, seen from outside."""
    with torch.no_grad():
        return layer(torch.eye(in_features)).T


def check_noise_floor(unit: Unit, values: Tensor, weight: Tensor, rel: float = 0.15) -> None:
    """What the codes' rounding would have for a norm is what it has."""
    assert unit.rounding_error is not None
    floor = rounding_noise((weight.shape[0], weight.shape[1]), unit.rounding_error, float(weight.norm()))
    assert float(torch.linalg.svdvals(values.float() - weight)[0]) == pytest.approx(floor, rel=rel)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4bit(kind: str, double: bool, weight: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 48, bias=False, quant_type=kind, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=double)
    model = nn.ModuleDict({"q_proj": layer.to("cpu")})
    unit = walk(model)[0]["q_proj.weight"]
    assert (unit.tensor.shape, unit.tensor.is_meta, unit.role) == ((48, 128), True, Role.LAYER)
    assert unit.quantization == f"bitsandbytes 4-bit ({kind})"
    values = unit.load().tensor
    assert values.dtype == torch.float32
    assert 0 < (values - weight).abs().max() < 1.0
    assert (values - effective(layer, 128)).abs().max() < 1e-5
    check_noise_floor(unit, values, weight)
    row = analyze(model, progress=False).rows[0]
    assert row.noise_floor == pytest.approx(0.09 * row.frobenius_norm * (48**-0.5 + 128**-0.5), rel=0.4)


def test_bitsandbytes_4bit_in_rows_that_blocks_do_not_divide() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(16, 80, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(80, 16, bias=False)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
    unit = walk(nn.ModuleDict({"q_proj": layer.to("cpu")}))[0]["q_proj.weight"]
    assert (unit.load().tensor - weight).abs().max() < 0.6  # bitsandbytes' own forward is off by 2 here


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4bit_repacked_by_a_forward(double: bool, weight: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    parameter = bnb.nn.Params4bit(weight[:32], requires_grad=False, quant_type="nf4", compress_statistics=double)
    parameter = parameter.to("cpu")
    before = quantized_weight(nn.Module(), "weight", parameter).deferred.read()
    # What CPUs with AVX-512 BF16 do in the first forward without gradients; it rounds the scales to bf16.
    repack = bnb.functional._convert_weight_packed_for_cpu
    parameter.data, parameter.quant_state = repack(parameter.data, parameter.quant_state)
    codes = parameter.data.clone()
    for _ in range(2):
        after = quantized_weight(nn.Module(), "weight", parameter).deferred.read()
        torch.testing.assert_close(after.float(), before.float(), rtol=2**-7, atol=0)
    assert torch.equal(parameter.data, codes)
    assert parameter.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("after_forward", [False, True])
def test_bitsandbytes_8bit_has_its_scales_on_the_weight_or_the_module(after_forward: bool, weight: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    if after_forward:
        layer(torch.randn(2, 128))
        assert layer.weight.SCB is None
    scale = layer.state.SCB if after_forward else layer.weight.SCB
    unit = walk(nn.ModuleDict({"q_proj": layer}))[0]["q_proj.weight"]
    values = unit.load().tensor
    assert torch.equal(values, bnb.functional.int8_vectorwise_dequant(layer.weight.data, scale))
    assert (values - weight).abs().max() < 0.03
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.int8, "cpu")


def test_bitsandbytes_through_transformers(tiny_llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path)
    plain = analyze(tmp_path, progress=False)
    for options in ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}):
        settings = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
        report = analyze(model, progress=False)
        assert [row.name for row in report.rows] == [row.name for row in plain.rows]
        row, reference = (r["model.layers.0.mlp.up_proj.weight"] for r in (report, plain))
        assert row.frobenius_norm != reference.frobenius_norm
        assert row.frobenius_norm == pytest.approx(reference.frobenius_norm, rel=0.05)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchao(config: str, weight: Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(128, 48, bias=False).to(torch.bfloat16)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16))
    model = nn.ModuleDict({"q_proj": layer})
    quantization.quantize_(model, getattr(quantization, config)())
    unit = walk(model)[0]["q_proj.weight"]
    assert unit.quantization.startswith("torchao ")
    values = unit.load().tensor
    assert type(values) is Tensor
    assert torch.equal(values, layer.weight.dequantize())
    assert 0 < (values - weight.to(torch.bfloat16)).abs().max() < 0.2
    check_noise_floor(unit, values, weight.to(torch.bfloat16).float(), rel=0.25)


@pytest.mark.parametrize("permuted", [False, True])
def test_gguf_blocks_that_stay_packed(permuted: bool, weight: Tensor) -> None:
    gguf = pytest.importorskip("gguf")
    from transformers.integrations.gguf.utils import GgufLinear

    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(weight.numpy(), kind)
    layer = GgufLinear(128, 48, int(kind))
    layer.weight = nn.Parameter(torch.from_numpy(np.array(blocks)), requires_grad=False)
    if permuted:
        layer.input_permutation = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    unit = walk(nn.ModuleDict({"q_proj": layer}))[0]["q_proj.weight"]
    assert (unit.role, unit.quantization) == (Role.LAYER, "GGUF Q8_0")
    values = unit.load().tensor
    if permuted:
        assert torch.equal(values[:, layer.input_permutation], torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    else:
        assert torch.equal(values, torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    check_noise_floor(unit, values, weight[:, torch.argsort(layer.input_permutation)] if permuted else weight)
    x = torch.randn(70, 128, generator=torch.Generator().manual_seed(2))  # enough rows to be unpacked, not gemv
    assert (layer._unpack_matmul(x[:, layer.input_permutation] if permuted else x) - x @ values.T).abs().max() < 1e-3


def test_float8_with_a_grid_of_scales(weight: Tensor) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight

    layer = FP8Linear(128, 48, block_size=(32, 50))  # neither divides its dimension
    layer.weight.data = weight.to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) + 0.5
    units, skipped = walk(nn.ModuleDict({"q_proj": layer}))
    values = units["q_proj.weight"].load().tensor
    assert torch.equal(
        values, _dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, layer.block_size, torch.float32)
    )
    assert units["q_proj.weight"].quantization == "float8_e4m3fn with weight_scale_inv (FP8Linear)"
    assert not [skip for skip in skipped.values() if skip.reason is SkipReason.QUANTIZED]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (48, 1)])
def test_float8_with_one_scale_or_one_a_row(shape: tuple[int, ...], weight: Tensor) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(weight.to(torch.float8_e5m2), requires_grad=False)
    model.weight_scale = nn.Parameter(torch.rand(shape) + 0.5)
    values = walk(model)[0]["weight"].load().tensor
    assert torch.equal(values, model.weight.float() * model.weight_scale.detach())


def test_float8_without_scales_is_a_number_format(weight: Tensor) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    unit = walk(model)[0]["weight"]
    assert (unit.deferred, unit.quantization) == (None, "")


class QuantLinear(nn.Module):
    """The outside of GPTQ's and AWQ's layers: packed integers and scales in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 4))


class EightBitLinear(nn.Module):
    """Integers in a parameter and scales next to it, as EETQ has them; or float8 with scales of an unknown layout."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
        self.weight_scales = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("layer", "name", "detail"),
    [
        (QuantLinear(), "up.qweight", "QuantLinear, int32 in a buffer"),
        (EightBitLinear(torch.int8), "up.weight", "EightBitLinear, int8"),
        (
            EightBitLinear(torch.float8_e4m3fn),
            "up.weight",
            "float8_e4m3fn with weight_scales (EightBitLinear) of shape",
        ),
        (torch.ao.nn.quantized.dynamic.Linear(4, 4), "up.weight", "torch.ao Linear, qint8"),
    ],
)
def test_other_kinds_are_skipped_by_name(layer: nn.Module, name: str, detail: str) -> None:
    model = nn.ModuleDict({"up": layer, "down": nn.Linear(4, 4)})
    units, skipped = walk(model)
    assert [unit for unit in units if unit.startswith("up.") and "scale" not in unit] == []
    assert skipped[name].reason is SkipReason.QUANTIZED
    assert detail in skipped[name].detail


def test_position_ids_and_masks_are_no_weights() -> None:
    model = nn.Module()
    model.register_buffer("position_ids", torch.arange(6).reshape(2, 3))
    model.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))
    assert walk(model) == ({}, {})
