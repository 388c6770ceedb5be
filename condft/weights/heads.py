"""Attention heads as units of their own: rows of q, k and v, columns of o.

Names: `…self_attn.q_proj.weight[h3]` is query head 3; of `k_proj` and `v_proj` the index counts key-value heads, of
which grouped-query attention has fewer; of `o_proj`, `[h3]` are the columns that read query head 3. In a fused
projection the letter names the part: `…qkv_proj.weight[q3]`, `[k0]`, `[v0]`.

Only what is certain is split: a projection must be in a module whose class is named `…Attention`, have a name from
the tables below, and its size must agree with the model's own number of heads. Any other weight in such a module stays
one unit, and the report says why (`SkipReason.NOT_SPLIT`). A weight outside such a module, like the output projection
of BERT, does not count as attention's and stays one unit; the report says nothing about it.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from condft.weights.names import WRAPPER_PARTS

__all__ = ["HeadSlice", "heads_of"]

_PROJECTIONS = {
    "q": {"q_proj", "query", "q_lin", "q_attn", "q"},
    "k": {"k_proj", "key", "k_lin", "k"},
    "v": {"v_proj", "value", "v_lin", "v"},
    "o": {"o_proj", "out_proj", "out_lin", "c_proj", "o"},
}
_PART_OF = {name: part for part, names in _PROJECTIONS.items() for name in names}

# Fused projections whose outputs are all queries, then all keys, then all values. Others interleave them head by head
# (GPT-NeoX, BLOOM) or in groups (Falcon), under the same names: so each layout here was read in the model's code.
_FUSED_IN_BLOCKS = {
    "GPT2Attention": "c_attn",
    "DecisionTransformerGPT2Attention": "c_attn",
    "Phi3Attention": "qkv_proj",
    "Phi4MultimodalAttention": "qkv_proj",
}


@dataclass(frozen=True)
class HeadSlice:
    """One head's part of a projection's weight.

    Attributes:
        label: `h3`, or `q3`, `k3`, `v3` in a fused projection.
        part: `q`, `k` or `v` in a fused projection, else empty.
        dim: The dimension of the weight that is split.
        start: First index along it.
        stop: One past the last index.
    """

    label: str
    part: str
    dim: int
    start: int
    stop: int

    def take(self, weight: Tensor) -> Tensor:
        """This head's part of the weight, a view."""
        return weight.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class _Geometry:
    head_dim: int
    value_head_dim: int  # in latent attention (DeepSeek) values have another size than queries
    num_heads: int
    num_key_value_heads: int

    def count(self, part: str) -> int:
        return self.num_key_value_heads if part in "kv" else self.num_heads

    def width(self, part: str) -> int:
        return self.value_head_dim if part in "vo" else self.head_dim

    def size(self, part: str) -> int:
        return self.count(part) * self.width(part)


def heads_of(model: nn.Module, path: str, module: nn.Module, shape: tuple[int, ...]) -> list[HeadSlice] | str | None:
    """How the weight of a module is split into attention heads.

    Args:
        model: The whole model.
        path: Path of the module in it.
        module: The module that holds the weight.
        shape: The weight's shape, two dimensions.

    Returns:
        One slice for each head, in order; a string that says why a weight of attention stays one unit; None for a
        weight that is not attention's.
    """
    parts = [part for part in path.split(".") if part not in WRAPPER_PARTS]
    parent_path = path.rpartition(".")[0]
    if not parts:
        return None
    attention = _attention(model, parent_path)
    if attention is None:
        return None
    geometry = _geometry(attention, _config(model, parent_path))
    if isinstance(geometry, str):
        return geometry
    # Conv1D holds (in, out) where Linear holds (out, in).
    out_dim = 1 if type(module).__name__ == "Conv1D" else 0
    if _FUSED_IN_BLOCKS.get(type(attention).__name__) == parts[-1]:
        return _fused(geometry, shape, out_dim)
    part = _PART_OF.get(parts[-1])
    if part is None:
        return f"{parts[-1]} of {type(attention).__name__} is not known to hold heads one after another"
    dim = 1 - out_dim if part == "o" else out_dim
    if shape[dim] != geometry.size(part):
        side = "columns" if dim else "rows"
        return f"{shape[dim]} {side} are not {geometry.count(part)} heads of {geometry.width(part)}"
    width = geometry.width(part)
    return [HeadSlice(f"h{i}", "", dim, i * width, (i + 1) * width) for i in range(geometry.count(part))]


def _fused(geometry: _Geometry, shape: tuple[int, ...], dim: int) -> list[HeadSlice] | str:
    # GPT-2's cross-attention fuses keys and values only.
    parts = next((p for p in ("qkv", "kv") if sum(map(geometry.size, p)) == shape[dim]), None)
    if parts is None:
        return f"its {shape[dim]} outputs are neither q, k, v nor k, v with heads of {geometry.head_dim}"
    slices: list[HeadSlice] = []
    start = 0
    for part in parts:
        for head in range(geometry.count(part)):
            slices.append(HeadSlice(f"{part}{head}", part, dim, start, start + geometry.width(part)))
            start += geometry.width(part)
    return slices


def _attention(model: nn.Module, path: str) -> nn.Module | None:
    """The attention module at `path` or around the wrappers there; None if there is none."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if type(module).__name__.endswith("Attention"):
            return module
        # Outward through wrappers only: a weight inside another module is not attention's.
        if not hasattr(module, "base_layer") and not (depth and parts[depth - 1] in WRAPPER_PARTS):
            return None
    return None


def _config(model: nn.Module, path: str) -> Any:
    """The config nearest to an attention module that counts its heads."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if _first(config, "num_attention_heads") is not None:
            return config
    return None


def _geometry(attention: nn.Module, config: Any) -> _Geometry | str:
    # The module's own numbers go before the config's: they are what it computes with.
    num_heads = _first(attention, "num_heads", "num_attention_heads", "n_heads") or _first(
        config, "num_attention_heads"
    )
    if num_heads is None:
        return f"neither {type(attention).__name__} nor its config has the number of heads"
    head_dim = _first(attention, "head_dim", "attention_head_size", "key_value_proj_dim") or _first(config, "head_dim")
    if head_dim is None:
        hidden_size = _first(config, "hidden_size")
        if hidden_size is None or hidden_size % num_heads:
            return f"neither {type(attention).__name__} nor its config has the size of a head"
        head_dim = hidden_size // num_heads
    # How many query heads share a key-value head: attention like Llama's has this number only.
    groups = _first(attention, "num_key_value_groups")
    num_key_value_heads = (
        _first(attention, "num_key_value_heads")
        or (num_heads // groups if groups else None)
        or _first(config, "num_key_value_heads")
        or num_heads
    )
    value_head_dim = _first(attention, "v_head_dim") or head_dim
    return _Geometry(head_dim, value_head_dim, num_heads, num_key_value_heads)


def _first(holder: Any, *names: str) -> int | None:
    """The first of these attributes that is a whole number."""
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
