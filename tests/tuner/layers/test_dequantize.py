"""Training over quantized bases: copies start from the dequantized values, the quantized bytes never change.

bitsandbytes repacks 4-bit weights in a forward without gradients on CPUs with AVX-512 BF16, and no gradient passes
them after that: so what is trained here has had no such forward, and references come from models of their own.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from condft import CondFTConfig, analyze, select_units
from condft.files.hashing import tensor_sha256
from condft.tuner import CondFTLayer, decay_towards_base, export_delta, parameter_groups
from condft.tuner.layers.dequantize import dense_values
from condft.weights.names import canonical_name
from tests.helpers.marks import needs_gpu
from tests.helpers.models.tiny_models import logits, train, trainable

UNITS = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"]
HEADS = ["model.layers.0.self_attn.q_proj.weight[h1]", "model.layers.1.self_attn.o_proj.weight[h0]"]
KINDS = ("nf4 twice", "int8", "torchao int8")


def settings(kind: str) -> Any:
    if kind.startswith("torchao"):
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant=kind.endswith("twice")
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    """A Llama whose widths are multiples of 64, the block of bitsandbytes."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=96, tie_word_embeddings=True))
    folder: Path = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    return str(request.param)


Load = Callable[..., Any]


@pytest.fixture
def load(checkpoint: Path) -> Load:
    def build(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=settings(kind), device_map=device, dtype=dtype
        ).train()

    return build


def layers_of(model: nn.Module) -> dict[str, CondFTLayer]:
    return {canonical_name(path): m for path, m in model.named_modules() if isinstance(m, CondFTLayer)}


def stored_bytes(layer: nn.Module) -> dict[str, str]:
    """Digests of everything that a quantized layer would write into a checkpoint."""
    found: dict[str, str] = {}
    for name, tensor in layer.state_dict().items():
        parts = {"": tensor} if type(tensor) is Tensor else {k: getattr(tensor, k) for k in ("qdata", "scale")}
        found |= {f"{name} {part}": tensor_sha256(value) for part, value in parts.items()}
    return found


def dequantized(model: Any) -> LlamaForCausalLM:
    """The plain model of the values that a quantized one computes with."""
    plain = LlamaForCausalLM(model.config).train()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dense_values(model, name))
    return plain


def test_the_selection_is_that_of_the_dequantized_values(kind: str, load: Load) -> None:
    model = load(kind)
    expected = select_units(analyze(dequantized(model), progress=False), num_tensors=5)
    config = CondFTConfig(num_tensors=5)
    wrapped = get_peft_model(model, config)
    assert config.target_units == list(expected.names)
    assert len(trainable(wrapped)) == 5
    for layer in layers_of(wrapped).values():
        copied = layer.copies_of("weight")["default"]
        assert torch.equal(copied, dense_values(layer.get_base_layer(), "weight").float())
    assert set(wrapped.get_layer_status()[0].quantization_backend.split()) & {"bitsandbytes", "torchao"}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in KINDS), *((kind, torch.bfloat16) for kind in ("nf4", "fp4", *KINDS[1:]))],
)
def test_life_cycle(kind: str, dtype: torch.dtype, load: Load, token_ids: Tensor) -> None:
    check_life_cycle(kind, dtype, load, token_ids, "cpu")


def test_copies_that_were_cast_to_half_precision_warn(kind: str, load: Load, token_ids: Tensor) -> None:
    """TRL's trainers cast them so for LoRA. A full-rank copy is large next to its updates: rounding loses them."""
    model = get_peft_model(load(kind), CondFTConfig(target_units=UNITS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(token_ids)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"trained in bfloat16 over a quantized base, .* parameter.data.float\(\)"):
        model(token_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.eval()(token_ids)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", *KINDS[:2]])
def test_life_cycle_by_the_kernels_of_a_gpu(kind: str, dtype: torch.dtype, load: Load, token_ids: Tensor) -> None:
    check_life_cycle(kind, dtype, load, token_ids.cuda(), "cuda")


def check_life_cycle(kind: str, dtype: torch.dtype, load: Load, token_ids: Tensor, device: str) -> None:
    """Trains, merges, and unmerges to the original bytes."""
    reference = logits(load(kind, dtype, device).eval(), token_ids)
    model = get_peft_model(load(kind, dtype, device), CondFTConfig(target_units=[*UNITS, *HEADS]))
    copies = trainable(model)
    assert {p.dtype for p in copies.values()} == {torch.float32}
    layers = layers_of(model)
    before = {path: stored_bytes(layer.get_base_layer()) for path, layer in layers.items()}
    losses = train(model, token_ids)
    assert losses[-1] < losses[0]
    model.merge_adapter(safe_merge=True)
    assert {type(layer.get_base_layer()) for layer in layers.values()} == {nn.Linear}
    merged = logits(model.eval(), token_ids)
    model.unmerge_adapter()
    assert {path: stored_bytes(layer.get_base_layer()) for path, layer in layers.items()} == before
    assert torch.equal(logits(model, token_ids), merged)
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), reference)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), reference)
    assert torch.equal(logits(model.unload(), token_ids), reference)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_it_trains_as_the_dequantized_model_would(kind: str, load: Load, token_ids: Tensor) -> None:
    """bitsandbytes' and torchao's own products of frozen layers are those of the dequantized values, in fp32."""
    model = load(kind)
    plain = get_peft_model(dequantized(model), CondFTConfig(target_units=[*UNITS, *HEADS]))
    wrapped = get_peft_model(model, CondFTConfig(target_units=[*UNITS, *HEADS]))
    assert train(wrapped, token_ids) == pytest.approx(train(plain, token_ids), rel=1e-5)
    for mine, other in zip(trainable(wrapped).values(), trainable(plain).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_of_a_weight_that_trains_in_heads_no_dense_values_are_kept(
    load: Load, token_ids: Tensor, monkeypatch: Any
) -> None:
    model = get_peft_model(load("nf4"), CondFTConfig(target_units=HEADS[:1]))
    calls: list[str] = []

    def counted(*args: Any) -> Tensor:
        calls.append("read")
        return dense_values(*args)

    monkeypatch.setattr("condft.tuner.layers.dequantize.dense_values", counted)
    loss = model(input_ids=token_ids, labels=token_ids).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2  # read again, because nothing was kept


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_fits_the_quantized_base_and_the_plain_one(
    kind: str, low_cpu_mem_usage: bool, load: Load, checkpoint: Path, token_ids: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(load(kind), CondFTConfig(target_units=UNITS))
    train(model, token_ids)
    model.save_pretrained(tmp_path)
    for base in (load(kind), AutoModelForCausalLM.from_pretrained(checkpoint)):
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for path, layer in layers_of(loaded).items():
            copied = layer.copies_of("weight")["default"]
            assert torch.equal(copied, layers_of(model)[path].copies_of("weight")["default"])
    assert logits(model.eval(), token_ids).shape == logits(loaded, token_ids).shape


def test_a_merged_model_is_saved_partly_dense_and_read_as_that(
    kind: str, load: Load, token_ids: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(load(kind), CondFTConfig(target_units=UNITS))
    train(model, token_ids)
    trained = {path: layer.copies_of("weight")["default"].detach() for path, layer in layers_of(model).items()}
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for path, values in trained.items():
        assert type(again.get_submodule(path)) is nn.Linear
        assert torch.equal(again.get_submodule(path).weight, values)
    frozen = "model.layers.1.mlp.up_proj"
    assert stored_bytes(again.get_submodule(frozen)) == stored_bytes(merged.get_submodule(frozen))
    assert torch.equal(logits(again, token_ids), logits(merged, token_ids))


def test_kbit_preparation_checkpointing_and_autocast(kind: str, load: Load, token_ids: Tensor) -> None:
    base = prepare_model_for_kbit_training(load(kind, torch.bfloat16))
    model = get_peft_model(base, CondFTConfig(target_units=[*UNITS, *HEADS])).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=token_ids, labels=token_ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable(model).values())


def test_what_reads_the_base_reads_its_dequantized_values(kind: str, load: Load, token_ids: Tensor) -> None:
    model = get_peft_model(load(kind), CondFTConfig(target_units=UNITS))
    train(model, token_ids)
    base = {path: dense_values(layer.get_base_layer(), "weight").float() for path, layer in layers_of(model).items()}
    delta = export_delta(model)
    twin = copy.deepcopy(model)
    for path, layer in layers_of(twin).items():
        copied = layer.copies_of("weight")["default"]
        torch.testing.assert_close(delta.tensors[f"{path}.weight"].dense(), copied.detach() - base[path])
    groups = parameter_groups(twin, lr=0.5, weight_decay=1.0, decay_towards="base")
    optimizer = decay_towards_base(torch.optim.SGD(groups), twin)
    for copied in trainable(twin).values():
        copied.grad = torch.zeros_like(copied)
    optimizer.step()
    for path, layer in layers_of(twin).items():
        start = layers_of(model)[path].copies_of("weight")["default"]
        torch.testing.assert_close(layer.copies_of("weight")["default"], (start + base[path]) / 2)
    twin.merge_adapter()
    assert all(torch.equal(layer.base_values("weight").float(), base[p]) for p, layer in layers_of(twin).items())


def test_adapters_switch(kind: str, load: Load, token_ids: Tensor) -> None:
    model = get_peft_model(load(kind), CondFTConfig(target_units=UNITS))
    train(model, token_ids)
    model.add_adapter("other", CondFTConfig(target_units=[*UNITS[1:], *HEADS]))
    model.set_adapter("other")
    train(model, token_ids)
    model.eval()
    second = logits(model, token_ids)
    model.merge_adapter()
    assert torch.equal(logits(model, token_ids), second)
    model.unmerge_adapter()
    model.set_adapter("default")
    first = logits(model, token_ids)
    assert not torch.equal(first, second)
    model.delete_adapter("other")
    assert torch.equal(logits(model, token_ids), first)


def test_offload_leaves_what_is_quantized_in_place(load: Load) -> None:
    model = get_peft_model(load("nf4"), CondFTConfig(target_units=UNITS, offload_base=True))
    assert all(layer.offloaded_parameters() == [] for layer in layers_of(model).values())


class PackedLinear(nn.Module):
    """Attributes as in GPTQ's and AWQ's layers: packed integers and scales in buffers, for kernels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 4))


def test_what_cannot_be_dequantized_is_refused_by_name() -> None:
    model = nn.ModuleDict({"up": PackedLinear(), "down": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"'up.qweight' cannot be trained: it is quantized \(PackedLinear, int32\)"):
        get_peft_model(model, CondFTConfig(target_units=["up.qweight"]))
    with pytest.raises(ValueError, match=r"1 weights are quantized and cannot be trained, the first is up.qweight"):
        get_peft_model(nn.ModuleDict({"up": PackedLinear()}), CondFTConfig(num_tensors=1))
    stack = nn.ModuleDict({"experts": nn.Module()})
    stack["experts"].gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    stack["experts"].gate_up_proj_scale_inv = nn.Parameter(torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="it is quantized"):
        get_peft_model(stack, CondFTConfig(target_units=["experts.gate_up_proj[0]"]))


def test_scaled_float8_trains_as_its_values() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(64, 32, block_size=(32, 32))
    layer.weight.data = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) + 0.5
    model = get_peft_model(nn.Sequential(layer), CondFTConfig(target_units=["0.weight"]))
    values, x = dense_values(layer, "weight"), torch.randn(3, 64)
    assert torch.equal(model(x), x @ values.T)
    model.merge_adapter()
    assert torch.equal(model(x), x @ values.T)
    model.unmerge_adapter()
    assert layers_of(model)["0"].get_base_layer() is layer


def test_a_weight_that_a_parametrization_computes_is_refused() -> None:
    """A merge would write into a tensor that the next forward computes anew."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"computed by a parametrization: .*remove_parametrizations"):
        get_peft_model(copy.deepcopy(model), CondFTConfig(target_units=["0.weight"]))
    config = CondFTConfig(num_tensors=2)
    with pytest.warns(UserWarning, match="takes all 1 candidate"):
        get_peft_model(model, config)
    assert config.target_units == ["1.weight"]


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm")
@pytest.mark.parametrize("kind", ["pruned", "weight_norm", "spectral_norm"])
def test_a_weight_that_a_hook_computes_is_refused(kind: str) -> None:
    layer = nn.Linear(4, 4)
    if kind == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        getattr(nn.utils, kind)(layer)
    with pytest.raises(ValueError, match=r"'0\.weight' cannot be trained: it is computed by a hook: .* remove_weight"):
        get_peft_model(nn.Sequential(layer, nn.Linear(4, 4)), CondFTConfig(target_units=["0.weight"]))
