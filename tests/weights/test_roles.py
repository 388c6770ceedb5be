"""What a weight is for follows from its module's kind, its name and its neighbors."""

from typing import Any

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from condft.report import Role
from condft.weights.roles import role_of, special_modules


class _Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])


class TopRouter(nn.Linear):
    pass


def role(modules: dict[str, nn.Module], path: str, key: str = "weight") -> Role:
    model = nn.ModuleDict(modules)
    return role_of(model, path, model.get_submodule(path), key)


@pytest.mark.parametrize(
    ("module", "name", "key", "expected"),
    [
        (nn.Linear(4, 3), "proj", "weight", Role.LAYER),
        (nn.Conv1d(3, 4, 2), "conv", "weight", Role.LAYER),
        (Conv1D(4, 3), "c_attn", "weight", Role.LAYER),
        (nn.MultiheadAttention(4, 2), "attn", "in_proj_weight", Role.LAYER),
        (nn.Embedding(5, 3), "embed", "weight", Role.EMBEDDING),
        (nn.Linear(4, 3), "lm_head", "weight", Role.OUTPUT_HEAD),
        (nn.Linear(4, 3), "classifier", "weight", Role.OUTPUT_HEAD),
        (TopRouter(4, 3), "choice", "weight", Role.ROUTER),
        (nn.Linear(4, 3), "gate", "weight", Role.LAYER),  # without experts next to it: a gated MLP's
        (nn.LayerNorm(3), "norm", "weight", Role.PARAMETER),
        (nn.Linear(4, 3), "proj", "extra", Role.PARAMETER),
    ],
)
def test_a_module_of_its_kind(module: nn.Module, name: str, key: str, expected: Role) -> None:
    assert role({name: module}, name, key) is expected


def test_a_gate_next_to_experts_is_a_router_and_a_bare_expert_tensor_an_expert() -> None:
    assert role({"mlp": _Moe()}, "mlp.gate") is Role.ROUTER
    assert role({"mlp": _Moe()}, "mlp.experts.0") is Role.LAYER
    assert role({"experts": nn.Module()}, "experts", "gate_up_proj") is Role.EXPERT


def test_a_transformers_model_names_its_embeddings_and_its_head(tiny_llama: Any) -> None:
    untied = tiny_llama(tied=False)
    found = special_modules(untied)
    assert found[id(untied.model.embed_tokens)] is Role.EMBEDDING
    assert found[id(untied.lm_head)] is Role.OUTPUT_HEAD
    assert special_modules(nn.Linear(2, 2)) == {}
