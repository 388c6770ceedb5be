"""Whole weights under what transformers does with a model: its adapter methods, cache, checkpointing, compilation."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from condft import CondFTConfig
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_models import logits


def test_added_trained_saved_and_opened_by_auto_model(tiny_llama: Any, token_ids: Tensor, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(CondFTConfig(num_tensors=4))
    train(model, token_ids)
    adapted = logits(model, token_ids)
    assert not torch.equal(adapted, logits(tiny_llama(), token_ids))
    model.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(opened) is LlamaForCausalLM
    assert torch.equal(logits(opened, token_ids), adapted)
    as_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(as_peft, token_ids), adapted)
    opened.disable_adapters()
    assert torch.equal(logits(opened, token_ids), logits(tiny_llama(), token_ids))
    opened.enable_adapters()
    opened.add_adapter(CondFTConfig(num_tensors=2, order="highest"), "other")
    assert opened.active_adapters() == ["other"]
    opened.delete_adapter("other")
    opened.set_adapter("default")
    assert torch.equal(logits(opened, token_ids), adapted)


def test_what_transformers_says_of_files_that_do_not_fit(tiny_llama: Any, adapter: Any, tmp_path: Path) -> None:
    """Its loader asks no method: what is missing keeps the base's values, and it reports by name."""
    adapter(num_tensors=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first][:-1].clone()}, path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tiny_llama().load_adapter(str(tmp_path))
    save_file({key: value for key, value in tensors.items() if key != first} | {"else": torch.zeros(2)}, path)
    model = tiny_llama()
    report = model.load_adapter(str(tmp_path))
    assert report.unexpected_keys == {"else"}
    (missing,) = report.missing_keys
    layer = model.get_submodule(missing.partition(".condft_weight")[0])
    assert torch.equal(layer.condft_weight["default"], layer.base_layer.weight)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_the_merged_models_tokens(adapter: Any, token_ids: Tensor, use_cache: bool) -> None:
    model = adapter(num_tensors=6, lr=3.0, steps=8)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    tokens = model.generate(input_ids=token_ids, **options)
    assert tokens.shape == (2, 9 + 12)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=token_ids, **options), tokens)
    assert torch.equal(model.merge_and_unload().generate(input_ids=token_ids, **options | {"use_cache": True}), tokens)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(
    tiny_llama: Any, token_ids: Tensor, use_reentrant: bool
) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = get_peft_model(tiny_llama(), CondFTConfig(num_tensors=6)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert len(plain) == 6
    assert all(torch.equal(grad, recomputed[name]) for name, grad in plain.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_whole_weights_compile_without_graph_breaks(
    tiny_llama: Any, token_ids: Tensor, dtype: torch.dtype
) -> None:
    """One graph forward and backward, in one compilation for all steps, and the eager run's losses."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    losses: list[list[float]] = []
    for compiled in (False, True):
        model = get_peft_model(tiny_llama(layers=2).to(dtype), CondFTConfig(num_tensors=6)).train()
        run: Any = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(3):
            loss = run(input_ids=token_ids, labels=token_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert losses[1][2] < losses[1][0]
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_accelerates_offloading_is_told_to_bring_wrappers_back_whole(
    tiny_llama: Any, token_ids: Tensor, granularity: str
) -> None:
    def adapted() -> PeftModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = CondFTConfig(num_tensors=6, granularity=granularity, init_weights=False)
            return get_peft_model(tiny_llama(), config).eval()

    expected, cpu = logits(adapted(), token_ids), torch.device("cpu")
    with pytest.raises(ValueError, match=r"offloaded .* preload_module_classes .*'FunctionalLayer'"):
        logits(accelerate.cpu_offload(adapted(), cpu), token_ids)
    offloaded = accelerate.cpu_offload(adapted(), cpu, preload_module_classes=["FunctionalLayer"])
    assert torch.equal(logits(offloaded, token_ids), expected)
    with offloaded.disable_adapter():
        assert torch.equal(logits(offloaded, token_ids), logits(tiny_llama(), token_ids))
