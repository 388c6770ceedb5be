"""What a weight is for: a layer, an expert, an embedding, an output head, a router, or just a parameter."""

from typing import Any

from torch import nn

from condft.report import Role
from condft.weights.names import canonical_name

__all__ = ["role_of", "special_modules"]

_HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs", "embed_out"})
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
# Known by name: importing these classes from transformers takes time, and fails if an optional package is missing.
_LAYER_CLASSES = frozenset({"Conv1D", "GgufLinear"})


def special_modules(model: nn.Module) -> dict[int, Role]:
    """The roles that a transformers model gives itself: input embeddings and output head, by module id."""
    roles: dict[int, Role] = {}
    # Not only the model itself: the parts of a composed model have embeddings and heads of their own.
    for module in model.modules():
        for getter, role in (
            ("get_output_embeddings", Role.OUTPUT_HEAD),
            ("get_input_embeddings", Role.EMBEDDING),
        ):
            found = _call_getter(module, getter)
            if isinstance(found, nn.Module):
                # PEFT may have wrapped the module: the role is that of the layer inside.
                roles[id(getattr(found, "base_layer", found))] = role
    return roles


def role_of(model: nn.Module, path: str, module: nn.Module, key: str) -> Role:
    """The role of parameter `key` of the module at `path`, by its kind, its name and its neighbors.

    >>> layer = base.model.layers[0].mlp.up_proj
    >>> role_of(base, "model.layers.0.mlp.up_proj", layer, "weight").value
    'layer'
    """
    last = canonical_name(path).rpartition(".")[2]
    parent_path = path.rpartition(".")[0]
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    if last in _HEAD_NAMES:
        return Role.OUTPUT_HEAD
    if "Router" in type(module).__name__:
        return Role.ROUTER
    # `gate` alone says little: it is a router's name only next to experts.
    if last in _ROUTER_NAMES and hasattr(model.get_submodule(parent_path), "experts"):
        return Role.ROUTER
    if key == "weight" and (
        isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ in _LAYER_CLASSES
    ):
        return Role.LAYER
    if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight"):
        return Role.LAYER  # a linear layer's weight, which torch keeps without the layer
    if "expert" in f"{path}.{key}".lower():
        return Role.EXPERT
    return Role.PARAMETER


def _call_getter(module: nn.Module, getter: str) -> Any:
    method = getattr(type(module), getter, None)
    if method is None:
        return None
    try:
        return method(module)
    except (NotImplementedError, AttributeError):  # transformers' way to say that this model has none
        return None
