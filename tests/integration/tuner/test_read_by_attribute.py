"""Layers whose weight the module around them reads by attribute, past their forward: Mamba's, Qwen3.5's, LFM2's."""

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from condft import CondFTConfig
from condft.tuner.layers.mixed_batch import pass_adapter_names
from tests.helpers.models.tiny_models import logits

_COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        _ATTENTION | _LINEAR_ATTENTION | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _ATTENTION | {"layer_types": ["conv", "full_attention"]},
    ),
}


def tiny(kind: str) -> Any:
    config, model, options = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**_COMMON, **options)).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(3, 21).reshape(2, 9)


@pytest.mark.filterwarnings("ignore:the budget takes all")
@pytest.mark.parametrize("kind", MODELS)
def test_copies_act_and_train_wherever_they_are_read(kind: str, ids: Tensor) -> None:
    options: dict[str, Any] = {"trainable_fraction": 1.0, "bias": "selected"}
    assert torch.equal(logits(get_peft_model(tiny(kind), CondFTConfig(**options)), ids), logits(tiny(kind), ids))
    model = get_peft_model(tiny(kind), CondFTConfig(**options, init_weights=False)).eval()
    adapted = logits(model, ids)
    generated = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    steps = torch.stack(model.generate(input_ids=ids, **generated).logits)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny(kind), ids))
    model(input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), adapted)
    torch.testing.assert_close(torch.stack(model.generate(input_ids=ids, **generated).logits), steps)


class Scores(nn.Module):
    """Reads its layer by attribute, as a loss that never makes whole logits reads a head."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scores.weight.t() + self.scores.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_and_bias_are_what_acts_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    config = CondFTConfig(target_units=["scores.weight"], bias="selected", init_weights=False)
    model = get_peft_model(Scores().to(dtype), config)
    layer: Any = model.base_model.model.scores
    assert layer.condft_weight["default"].dtype == torch.float32
    x = torch.randn(3, 6, dtype=dtype)
    acting = model(x)
    assert acting.dtype == dtype
    for name in ("weight", "bias"):
        copy, base = layer.copies_of(name)["default"], layer.base_parameter(name)
        assert torch.equal(getattr(layer, name), copy.to(dtype))
        with model.disable_adapter():
            assert getattr(layer, name) is base
        assert not torch.equal(base, copy.to(dtype))
    model.merge_adapter()
    assert layer.weight is layer.base_layer.weight
    torch.testing.assert_close(model(x), acting)


def test_a_batch_of_several_adapters_cannot_read_past_the_forward() -> None:
    """It would be the same weight for every sample; what transformers asks a weight for besides is told."""
    config = CondFTConfig(target_units=["scores.weight"], init_weights=False)
    model = get_peft_model(Scores(), config).eval()
    x = torch.randn(2, 6)
    with pytest.raises(TypeError, match=r"weight of a Linear .*set_adapter"):
        model(x, adapter_names=["default", "__base__"])
    of_base = model(x, adapter_names=["__base__"] * 2)
    with model.disable_adapter():
        assert torch.equal(model(x), of_base)
    layer: Any = model.base_model.model.scores
    with pass_adapter_names(model, type(layer), ["default"], known=["default"]):
        weight = layer.weight
        assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (4, 6))
