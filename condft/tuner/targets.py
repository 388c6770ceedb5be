"""From unit names to what is wrapped: which module, which of its parameters, which slices."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from condft.tuner.layers.base import CondFTLayer, Parts
from condft.tuner.layers.dequantize import is_quantized, shape_of, why_not_trainable
from condft.tuner.layers.experts.layer import ExpertsLayer
from condft.tuner.layers.functional import SLICEABLE_LAYERS, SUPPORTED_LAYERS, FunctionalLayer
from condft.tuner.layers.slices import Slices
from condft.tuner.layers.substitution import CustomForwardLayer, SubstitutingLayer
from condft.weights.heads import HeadSlice, heads_of
from condft.weights.walk import canonical_name

__all__ = ["Target", "Targets", "layer_class", "parameter_of"]

_FORWARDS = {kind.forward for kind in SUPPORTED_LAYERS}
# nn.MultiheadAttention has one fused weight if keys, values and embeddings have the same width, else three.
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@dataclass(frozen=True)
class Target:
    """One unit, found in a model.

    Attributes:
        path: Canonical path of the module that is wrapped to train it.
        parameter: Name of the parameter in that module.
        slices: The unit's slice of it; None for all of it.
        called: The names that `target_modules` may match to select it.
    """

    path: str
    parameter: str
    slices: Slices | None
    called: tuple[str, ...]


def parameter_of(unit: str) -> str:
    """The name of the parameter that a unit is, or is a slice of.

    >>> parameter_of("mlp.experts.down_proj[17]")
    'mlp.experts.down_proj'
    """
    return unit.partition("[")[0]


def layer_class(module: nn.Module) -> type[CondFTLayer]:
    """The wrapper for a module."""
    if isinstance(module, SUPPORTED_LAYERS):
        # A quantized layer's forward is a kernel for its packed bits. The copy is dense, and needs the plain product.
        runs_as_its_kind = (type(module).forward in _FORWARDS and not _is_patched(module)) or is_quantized(module)
        return FunctionalLayer if runs_as_its_kind else CustomForwardLayer
    return SubstitutingLayer if isinstance(module, nn.MultiheadAttention) else ExpertsLayer


def _is_patched(module: nn.Module) -> bool:
    """Whether this one module has a forward of its own. That of accelerate's hooks only moves tensors."""
    return "forward" in vars(module) and "_hf_hook" not in vars(module)


class Targets:
    """The modules of a model by canonical path, and which of their parameters can train.

    Args:
        model: With or without adapters; units are found in the base layers.

    >>> targets = Targets(base)
    >>> targets.find("model.layers.0.self_attn.q_proj.weight[h1]").slices
    Slices(dim=0, runs=((8, 16),))
    >>> print(targets.find("model.norm.weight"))
    CondFT cannot train weight of a LlamaRMSNorm: it supports ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, tuple[str, nn.Module]] = {}
        self._wrappers: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            # A wrapper and its base layer have one canonical name. The base layer comes later: its path is kept.
            self._modules[canonical_name(path)] = (path, getattr(module, "base_layer", module))
            if hasattr(module, "base_layer"):
                self._wrappers[canonical_name(path)] = module
        self._heads: dict[str, list[HeadSlice] | str | None] = {}

    def has(self, path: str) -> bool:
        """Whether there is a module at a canonical path. A module that the model has twice is at its first only."""
        return path in self._modules

    def module(self, path: str) -> nn.Module:
        """The base layer at a canonical path."""
        return self._modules[path][1]

    def wrapper(self, path: str) -> nn.Module | None:
        """The wrapper that an adapter has put around the base layer at a canonical path, if there is one."""
        return self._wrappers.get(path)

    def find(self, unit: str) -> Target | str | None:
        """Finds a unit by name.

        Returns:
            Where it is; or why it cannot be trained, as text; or None if the model has no such parameter.
        """
        name, _, label = unit.removesuffix("]").partition("[")
        path, _, key = name.rpartition(".")
        if path not in self._modules:
            return None
        module = self.module(path)
        tensor = getattr(module, key, None)
        if not isinstance(tensor, Tensor):
            return None
        # Before the kind of layer: a quantized Linear is one too, and its packed bits have another shape.
        reason = why_not_trainable(module, key)
        if reason is not None:
            return reason
        parent_path = path.rpartition(".")[0]
        parent = self.module(parent_path) if parent_path in self._modules else None
        # The attention as a whole is wrapped: its forward reads the weights as attributes.
        if isinstance(module, nn.MultiheadAttention) and key in _ATTENTION_WEIGHTS:
            return _not_sliced(name, label) or Target(path, key, None, (path, name))
        # The attention reads out_proj.weight and never calls out_proj: a wrapper there would have no effect.
        if isinstance(parent, nn.MultiheadAttention) and f"{path.rpartition('.')[2]}.{key}" in _ATTENTION_WEIGHTS:
            return _not_sliced(name, label) or Target(parent_path, f"out_proj.{key}", None, (parent_path, path))
        if isinstance(module, SUPPORTED_LAYERS) and key == "weight":
            slices = self._head(name, path, label) if label else None
            return slices if isinstance(slices, str) else Target(path, key, slices, (path,))
        if tensor.ndim == 3 and path:  # a stack of experts
            slices = _of_stack(name, label, len(tensor))
            return slices if isinstance(slices, str) else Target(path, key, slices, (path, name))
        kinds = ", ".join(kind.__name__ for kind in SUPPORTED_LAYERS)
        return (
            f"CondFT cannot train {key} of a {type(module).__name__}: it supports {kinds}, MultiheadAttention, and "
            "stacks of three dimensions"
        )

    def plan(self, units: Iterable[str], *, bias: bool) -> dict[str, Parts]:
        """Which modules to wrap for these units, and which parts of them train.

        Args:
            units: Names of units.
            bias: Whether the biases that belong to the units train too.

        Returns:
            Canonical module path -> its parts.

        Raises:
            ValueError: A unit that cannot be trained, or that is named twice.
        """
        units = list(units)
        twice = sorted(name for name, count in Counter(units).items() if count > 1)
        if twice:
            raise ValueError(f"{len(twice)} units are named twice, the first is {twice[0]!r}: name each once")
        slices_of: dict[tuple[str, str], list[Slices | None]] = defaultdict(list)
        for unit in units:
            target = self.find(unit)
            if not isinstance(target, Target):
                raise ValueError(f"{unit!r} cannot be trained: {target or 'the model has no such parameter'}")
            slices_of[target.path, target.parameter].append(target.slices)
        plan: dict[str, dict[str, Slices | None]] = defaultdict(dict)
        for (path, parameter), found in slices_of.items():
            slices = _union(f"{path}.{parameter}", found)
            plan[path][parameter] = slices
        if bias:
            for path, parts in plan.items():
                parts.update(_biases(self.module(path), dict(parts)))
        return dict(plan)

    def _head(self, name: str, path: str, label: str) -> Slices | str:
        module_path, module = self._modules[path]
        if not isinstance(module, SLICEABLE_LAYERS):
            return f"{type(module).__name__} cannot be sliced: name {name!r} to train all of it"
        if name not in self._heads:  # each head of the weight asks again
            self._heads[name] = heads_of(self._model, module_path, module, shape_of(module, "weight"))
        heads = self._heads[name]
        if not isinstance(heads, list):
            why = heads or "it is not attention's"
            return f"it does not divide into heads ({why}): name {name!r} to train all of it"
        for head in heads:
            if head.label == label:
                return Slices(head.dim, ((head.start, head.stop),))
        return f"its {len(heads)} heads are [{heads[0].label}] to [{heads[-1].label}]"


def _not_sliced(name: str, label: str) -> str | None:
    return f"MultiheadAttention's weights cannot be sliced: name {name!r} to train all of it" if label else None


def _of_stack(name: str, label: str, length: int) -> Slices | str:
    if label.isdecimal() and int(label) < length:
        return Slices(0, ((int(label), int(label) + 1),))
    return f"it is a stack of {length} matrices, name one as {name}[0] to {name}[{length - 1}]"


def _union(name: str, found: list[Slices | None]) -> Slices | None:
    whole = found.count(None)
    if whole and len(found) > 1:
        raise ValueError(
            f"{name!r} is named as a whole and in {len(found) - whole} slices too: name either the one or the others"
        )
    parts = [slices for slices in found if slices is not None]
    # All heads of one weight are cut along the same dimension: rows of q, k and v, columns of the output.
    return None if whole else Slices.joined(parts[0].dim, (run for part in parts for run in part.runs))


def _biases(module: nn.Module, parts: Parts) -> dict[str, Slices | None]:
    """The biases of the outputs that the parts compute.

    A unit that is some rows of a weight computes some outputs, so it has those entries of the bias. One that is some
    columns computes a term of every output: it has none.
    """
    found: dict[str, Slices | None] = {}
    if isinstance(module, nn.MultiheadAttention):
        found = _attention_biases(module, parts)
    elif isinstance(module, SUPPORTED_LAYERS):
        slices = parts["weight"]
        out_dim = 0 if isinstance(module, nn.Linear) else 1  # a Conv1D holds (inputs, outputs)
        if getattr(module, "bias", None) is not None and (slices is None or slices.dim == out_dim):
            found["bias"] = None if slices is None else Slices(0, slices.runs)
    else:
        for parameter, slices in parts.items():
            bias = getattr(module, f"{parameter}_bias", None)
            if slices is not None and isinstance(bias, nn.Parameter) and bias.ndim == 2:  # (experts, outputs)
                found[f"{parameter}_bias"] = slices
    return found


def _attention_biases(module: nn.MultiheadAttention, parts: Parts) -> dict[str, Slices | None]:
    found: dict[str, Slices | None] = {}
    if module.in_proj_bias is not None:
        # One bias for q, k and v, in that order, whether their weights are fused or not.
        thirds = [i for i, key in enumerate("qkv") if f"{key}_proj_weight" in parts]
        if "in_proj_weight" in parts or len(thirds) == 3:  # all of it: None and not slices
            found["in_proj_bias"] = None
        elif thirds:
            size = module.embed_dim
            found["in_proj_bias"] = Slices.joined(0, ((i * size, (i + 1) * size) for i in thirds))
    if "out_proj.weight" in parts and module.out_proj.bias is not None:
        found["out_proj.bias"] = None
    return found
