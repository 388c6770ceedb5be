"""`offload_base`: originals that a copy replaces are on the CPU, and return to their device when they are used.

Without an accelerator the meta device plays its part: torch refuses to compute with tensors of two devices, so the
tests show where each tensor is, and that nothing reads an offloaded one. Meta tensors have no values, but the
originals' values stay on the CPU, so they are checked too. The last test needs a GPU.
"""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig
from condft.files.hashing import tensor_sha256
from condft.tuner import CondFTLayer, decay_towards_base, export_delta, parameter_groups
from condft.weights.names import canonical_name
from tests.helpers.marks import needs_gpu
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits, train

SELECTED = [f"model.layers.{i}.{name}.weight" for i, name in ((0, "self_attn.q_proj"), (2, "mlp.up_proj"))]


def offloading(**options: Any) -> PeftModel:
    config = CondFTConfig(target_units=SELECTED, offload_base=True, **options)
    return get_peft_model(build_tiny_llama(), config)


def originals(model: nn.Module) -> dict[str, Tensor]:
    return {canonical_name(name): p for name, p in model.named_parameters() if ".base_layer." in name}


def places(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in originals(model).values()}


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensor_sha256(tensors[name]) for name in SELECTED}


BASE = digests(dict(build_tiny_llama().named_parameters()))


def test_on_the_cpu_nothing_changes(token_ids: Tensor) -> None:
    plain = get_peft_model(build_tiny_llama(), CondFTConfig(target_units=SELECTED))
    model = offloading()
    assert train(model, token_ids) == train(plain, token_ids)
    model.merge_adapter()
    layers = {canonical_name(path): m for path, m in model.named_modules() if isinstance(m, CondFTLayer)}
    assert digests({f"{path}.weight": layer.base_values("weight") for path, layer in layers.items()}) == BASE
    model.unmerge_adapter()
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids), logits(build_tiny_llama(), token_ids))
    assert torch.equal(logits(model.unload(), token_ids), logits(build_tiny_llama(), token_ids))


def test_on_another_device_only_the_originals_stay_on_the_cpu(token_ids: Tensor) -> None:
    model = offloading().to("meta")
    elsewhere = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert elsewhere == {f"base_model.model.{name.removesuffix('weight')}base_layer.weight" for name in SELECTED}
    assert digests(originals(model)) == BASE
    assert model(token_ids.to("meta")).logits.is_meta  # no operation had a tensor on the CPU among its inputs
    model(token_ids.to("meta")).logits.sum().backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)
    state = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    assert digests(state) == BASE


@pytest.mark.parametrize("way", ["disable", "other adapter", "merge", "move while disabled"])
def test_they_return_when_used_and_are_offloaded_again(way: str, token_ids: Tensor) -> None:
    model, ids = offloading().to("meta"), token_ids.to("meta")
    if way == "disable":
        with model.disable_adapter():
            assert places(model) == {"meta"}
            assert model(ids).logits.is_meta
    elif way == "other adapter":
        units = ["model.layers.1.mlp.up_proj.weight", SELECTED[1]]
        model.add_adapter("other", CondFTConfig(target_units=units))
        model.to("meta")
        model.set_adapter("other")
        assert places(model) == {"meta"}
        assert model(ids).logits.is_meta
        model.set_adapter("default")
        model.delete_adapter("other")
    elif way == "merge":
        model.merge_adapter()
        assert places(model) == {"meta"}
        assert model(ids).logits.is_meta
        model.unmerge_adapter()
    else:
        with model.disable_adapter():
            model.to("meta")
    moved = originals(model)
    assert {moved[name].device.type for name in SELECTED} == {"cpu"}
    assert digests(moved) == BASE
    assert model(ids).logits.is_meta


@pytest.mark.parametrize("way", ["unload", "merge_and_unload", "delete_adapter"])
def test_an_unwrapped_module_is_on_its_own_device(way: str, token_ids: Tensor) -> None:
    model = offloading().to("meta")
    left = model.delete_adapter("default") if way == "delete_adapter" else getattr(model, way)()
    whole = left if left is not None else model
    assert {parameter.device.type for parameter in whole.parameters()} == {"meta"}
    assert left is None or whole(token_ids.to("meta")).logits.is_meta


def test_weights_that_train_in_part_are_not_offloaded() -> None:
    units = ["model.layers.0.self_attn.q_proj.weight[h1]", SELECTED[1]]
    model = get_peft_model(build_tiny_llama(), CondFTConfig(target_units=units, offload_base=True)).to("meta")
    assert [name for name, parameter in originals(model).items() if not parameter.is_meta] == [SELECTED[1]]


def test_mixed_batches_restore_them_for_the_samples_of_the_base(token_ids: Tensor) -> None:
    model = offloading().eval().to("meta")
    assert model(token_ids.to("meta"), adapter_names=["default", "__base__"]).logits.is_meta
    assert digests(originals(model)) == BASE


def test_offloaded_originals_are_cast_copied_loaded_and_saved(token_ids: Tensor, tmp_path: Any) -> None:
    model = offloading().to("meta")
    twin = copy.deepcopy(model)
    twin.bfloat16()
    assert {(p.dtype, p.device.type) for n, p in originals(twin).items() if n in SELECTED} == {(torch.bfloat16, "cpu")}
    assert digests(originals(model)) == BASE
    state = {name: torch.full_like(tensor, 2.0, device="cpu") for name, tensor in originals(twin).items()}
    twin.base_model.model.load_state_dict(
        {name.replace(".weight", ".base_layer.weight"): tensor for name, tensor in state.items()}, strict=False
    )
    assert all(originals(twin)[name].eq(2.0).all() for name in SELECTED)
    train(trained := offloading(), token_ids)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_tiny_llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, token_ids), logits(trained, token_ids))
    loaded.to("meta")
    assert digests(originals(loaded)) == BASE


def test_biases_and_attention_modules_are_offloaded_too() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    units = ["0.in_proj_weight", "0.out_proj.weight", "1.weight"]
    config = CondFTConfig(target_units=units, bias="selected", offload_base=True)
    model = get_peft_model(attention, config).to("meta")
    assert {name for name, p in originals(model).items() if not p.is_meta} == {
        "0.in_proj_weight", "0.in_proj_bias", "0.out_proj.weight", "0.out_proj.bias", "1.weight", "1.bias"
    }  # fmt: skip
    x = torch.empty(3, 8, device="meta")
    wrapped = model.base_model.model
    assert wrapped[1](wrapped[0](x, x, x)[0]).is_meta


def test_data_parallel_training_ignores_offloaded_parameters() -> None:
    model = offloading()
    assert model._ddp_params_and_buffers_to_ignore == []  # all on one device
    model.to("meta")
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {p.device.type for n, p in model.named_parameters() if n not in ignored} == {"meta"}
    assert {p.device.type for n, p in model.base_model.named_parameters() if n not in ignored} == {"meta"}


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu(token_ids: Tensor) -> None:
    ids = token_ids.cuda()
    base = logits(build_tiny_llama().cuda(), ids)
    before = torch.cuda.memory_allocated()
    plain = get_peft_model(build_tiny_llama().cuda(), CondFTConfig(target_units=SELECTED))
    without = torch.cuda.memory_allocated() - before
    model = get_peft_model(build_tiny_llama().cuda(), CondFTConfig(target_units=SELECTED, offload_base=True))
    offloaded = sum(originals(model)[name].nbytes for name in SELECTED)
    assert torch.cuda.memory_allocated() - before - without == without - offloaded
    assert train(model, ids) == train(plain, ids)
    assert {p.device.type for n, p in originals(model).items() if n in SELECTED} == {"cpu"}
    adapted = logits(plain, ids)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), adapted)
    model.merge_adapter()
    assert torch.equal(logits(model, ids), adapted)
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():  # a base that is changed on its device is copied to the CPU again
        originals(model)[SELECTED[0]].zero_()
    assert originals(model)[SELECTED[0]].eq(0).all()
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1, decay_towards="base")
    optimizer = decay_towards_base(torch.optim.AdamW(groups), model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert export_delta(model).tensors
    assert {p.device.type for p in model.unload().parameters()} == {"cuda"}
