"""Single experts of fused stacks: only they train, as if the stack were unfrozen, at the cost of their own memory."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from condft import CondFTConfig, analyze, select_units
from condft.tuner.layers.experts.stack import ExpertStack
from tests.helpers.models.tiny_models import (
    check_gradients_are_those_of,
    check_life_cycle,
    logits,
    tiny_moe,
    train,
    trainable,
)

KINDS = ("mixtral", "olmoe", "gpt_oss")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EXPERTS = "model.layers.{}.mlp.experts.{}[{}]"
UNITS = [EXPERTS.format(0, "gate_up_proj", 1), EXPERTS.format(0, "gate_up_proj", 3), EXPERTS.format(1, "down_proj", 0)]


def adapted(base: nn.Module, units: list[str] = UNITS, **options: Any) -> PeftModel:
    return get_peft_model(copy.deepcopy(base), CondFTConfig(target_units=units, **options))


@pytest.fixture
def never_assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertStack, "assembled", lambda _: pytest.fail("the whole stack was put together"))


@pytest.mark.usefixtures("never_assembled")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_the_unfrozen_stack_would(kind: str, implementation: str, token_ids: Tensor) -> None:
    base = tiny_moe(kind, implementation)
    model = adapted(base)
    assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    for each in (base, model):
        each(input_ids=token_ids, labels=token_ids).loss.backward()
    entries = check_gradients_are_those_of(model, base)
    assert entries == sum(p.numel() for p in trainable(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_life_cycle(kind: str, implementation: str, token_ids: Tensor) -> None:
    base = tiny_moe(kind, implementation)
    model = adapted(base, bias="selected")
    losses = train(model, token_ids, steps=4)
    assert losses[-1] < losses[0]
    check_life_cycle(model, base, token_ids)


def test_only_the_slices_are_parameters_and_have_optimizer_state(token_ids: Tensor) -> None:
    model = adapted(tiny_moe())
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
    assert shapes == {
        "model.layers.0.mlp.experts.condft_gate_up_proj": (2, 96, 32),
        "model.layers.1.mlp.experts.condft_down_proj": (1, 32, 48),
    }
    assert model.get_nb_trainable_parameters()[0] == 2 * 96 * 32 + 32 * 48
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert sum(t.numel() for t in moments) == 2 * (2 * 96 * 32 + 32 * 48)


@settings(max_examples=8)
@given(st.data())
def test_any_subset_of_any_stack(data: st.DataObject) -> None:
    """Frozen experts keep their bytes through AdamW with weight decay; trained ones are the unfrozen model's."""
    every = [
        EXPERTS.format(layer, key, e) for layer in (0, 1) for key in ("gate_up_proj", "down_proj") for e in range(4)
    ]
    units = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    base = tiny_moe(implementation=data.draw(st.sampled_from(IMPLEMENTATIONS)))
    ids = torch.randint(3, 96, (2, data.draw(st.integers(1, 9))), generator=torch.Generator().manual_seed(1))
    model = adapted(base, units)
    for each in (base, model):
        each(input_ids=ids, labels=ids).loss.backward()
    check_gradients_are_those_of(model, base)
    train(model, ids)
    merged = dict(model.merge_and_unload().named_parameters())
    chosen = set(units)
    for name, parameter in base.named_parameters():
        if ".experts." not in name:
            assert torch.equal(merged[name], parameter), name
            continue
        for e in range(4):
            assert torch.equal(merged[name][e], parameter[e]) == (f"{name}[{e}]" not in chosen), f"{name}[{e}]"


def test_experts_compete_by_default_and_select_units_agrees() -> None:
    base = tiny_moe()
    report = analyze(base, progress=False)
    expected = select_units(report, num_tensors=12)
    config = CondFTConfig(num_tensors=12)
    get_peft_model(base, config)
    assert config.target_units == list(expected.names)
    assert expected.by_module_type["model.layers.*.mlp.experts.gate_up_proj"] == (4, 8)
    assert expected.num_candidates == 2 * (4 + 4 + 4)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": ["experts"]}, 16),
        ({"target_modules": ["mlp.experts"], "layers_to_transform": [1]}, 8),
        ({"target_modules": ["gate_up_proj"]}, 8),
        ({"target_modules": r".*\.1\.mlp\.experts\.down_proj"}, 4),
        ({"target_modules": ["experts"], "exclude_modules": ["down_proj"]}, 8),
        ({"target_modules": "all-linear"}, 8),
        ({"exclude_modules": ["experts"]}, 8),
    ],
)
def test_scope_by_module_or_parameter(options: dict[str, Any], count: int) -> None:
    config = CondFTConfig(**options)
    get_peft_model(tiny_moe(), config)
    assert config.target_units is not None
    assert len(config.target_units) == count


def test_biases_of_experts_are_no_units() -> None:
    config = CondFTConfig(target_modules=["experts"])
    get_peft_model(tiny_moe("gpt_oss"), config)
    assert config.target_units is not None
    assert not any("_bias" in name for name in config.target_units)
    with pytest.raises(ValueError, match="cannot train gate_up_proj_bias of a GptOssExperts"):
        adapted(tiny_moe("gpt_oss"), ["model.layers.0.mlp.experts.gate_up_proj_bias"])


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([EXPERTS.format(0, "gate_up_proj", 9)], r"name one as .*gate_up_proj\[0\] to .*gate_up_proj\[3\]"),
        (["model.layers.0.mlp.experts.gate_up_proj"], "is a stack of 4 matrices"),
        ([EXPERTS.format(7, "gate_up_proj", 0)], "do not exist in this base model"),
        ([UNITS[0], UNITS[0]], r"1 units are named twice, the first is .*gate_up_proj\[1\]'"),
        (["model.layers.0.self_attn.q_proj.weight[5]"], r"its 4 heads are \[h0\] to \[h3\]"),
        (["model.layers.0.input_layernorm.weight"], "cannot train weight of a MixtralRMSNorm"),
    ],
)
def test_units_that_cannot_be_trained_are_refused(units: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tiny_moe(), units)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path: Any, token_ids: Tensor, low_cpu_mem_usage: bool) -> None:
    base = tiny_moe()
    model = adapted(base)
    train(model, token_ids)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{prefix}.0.mlp.experts.condft_gate_up_proj": (2, 96, 32),
        f"{prefix}.1.mlp.experts.condft_down_proj": (1, 32, 48),
    }
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
    other = tiny_moe()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other, token_ids), logits(model, token_ids))


def test_adapters_with_different_slices_of_one_stack(token_ids: Tensor) -> None:
    base = tiny_moe()
    model = adapted(base)
    train(model, token_ids)
    first = logits(model, token_ids)
    others = [EXPERTS.format(0, "gate_up_proj", 0), EXPERTS.format(0, "down_proj", 2)]
    model.add_adapter("other", CondFTConfig(target_units=others))
    model.set_adapter("other")
    assert torch.equal(logits(model, token_ids), logits(base, token_ids))
    train(model, token_ids)
    second = logits(model, token_ids)
    alone = adapted(base, others)
    train(alone, token_ids)
    assert torch.equal(logits(alone, token_ids), second)
    model.merge_adapter(["default"])
    assert torch.equal(logits(model, token_ids), first)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model, token_ids), second)
    status = {layer.name: layer for layer in model.get_layer_status()}["model.model.layers.0.mlp.experts"]
    assert status.available_adapters == ["other"]
    assert status.requires_grad == {"other": True}


def test_deepcopies_train_apart(token_ids: Tensor) -> None:
    model = adapted(tiny_moe())
    before = logits(model, token_ids)
    train(copy.deepcopy(model), token_ids)
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointed_autocast_and_compiled_steps(implementation: str, token_ids: Tensor) -> None:
    def gradients(prepare: Any = lambda model: model, dtype: torch.dtype | None = None) -> list[Tensor]:
        model = adapted(tiny_moe(implementation=implementation)).train()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            prepare(model)(input_ids=token_ids, labels=token_ids).loss.backward()
        grads = [parameter.grad for parameter in trainable(model).values()]
        assert all(grad is not None for grad in grads)
        return [grad for grad in grads if grad is not None]

    def checkpointed(model: PeftModel) -> PeftModel:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        return model

    plain = gradients()
    for other, tolerance in (
        (gradients(checkpointed), 1e-6),
        (gradients(lambda model: torch.compile(model, backend="aot_eager")), 1e-5),
        (gradients(dtype=torch.bfloat16), 0.05),
    ):
        for mine, theirs in zip(plain, other, strict=True):
            assert (mine - theirs).norm() <= tolerance * mine.norm()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_an_expert_without_tokens_gets_a_gradient_of_zero(implementation: str) -> None:
    """Distributed training waits for a gradient in every process."""
    base = tiny_moe("olmoe", implementation)
    ids = torch.full((1, 3), 5)
    hit: set[int] = set()
    base.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: hit.update(args[1].flatten().tolist()))
    logits(base, ids)
    idle = min(set(range(8)) - hit)
    model = adapted(base, [EXPERTS.format(0, key, idle) for key in ("gate_up_proj", "down_proj")])
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [parameter.grad for parameter in trainable(model).values()]
    assert len(grads) == 2
    assert all(grad is not None and not grad.any() for grad in grads)


class ExpertByExpert(nn.Module):
    """The experts as older and remote code stores them: one module each."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = nn.ModuleDict({"gate_up": nn.Linear(32, 96, bias=False), "down": nn.Linear(48, 32, bias=False)})
            expert["gate_up"].weight.data.copy_(gate_up)
            expert["down"].weight.data.copy_(down)
            self.experts.append(expert)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            place, token = torch.where(nn.functional.one_hot(chosen, 4).permute(2, 1, 0)[index])
            if len(token):
                gate, up = expert["gate_up"](x[token]).chunk(2, dim=-1)
                result.index_add_(0, token, expert["down"](F.silu(gate) * up) * weights[token, place, None])
        return result


def test_fused_and_expert_by_expert_train_to_the_same_bits(token_ids: Tensor) -> None:
    fused, apart = tiny_moe(implementation="eager"), tiny_moe(implementation="eager")
    for layer in apart.model.layers:
        layer.mlp.experts = ExpertByExpert(layer.mlp.experts)
    keys = [(0, "gate_up", 1), (0, "gate_up", 3), (0, "down", 1), (1, "down", 0)]
    one = adapted(fused, [EXPERTS.format(layer, f"{key}_proj", e) for layer, key, e in keys])
    two = adapted(apart, [f"model.layers.{layer}.mlp.experts.experts.{e}.{key}.weight" for layer, key, e in keys])
    assert train(one, token_ids, steps=5) == train(two, token_ids, steps=5)
    stacks = one.merge_and_unload().model.layers
    modules = two.merge_and_unload().model.layers
    for layer, key, e in keys:
        stack = getattr(stacks[layer].mlp.experts, f"{key}_proj")
        assert torch.equal(stack[e], modules[layer].mlp.experts.experts[e][key].weight)
