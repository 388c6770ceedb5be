"""Names of weights and modules: without the parts of wrappers, and the module type that a path gives."""

import re

__all__ = ["WRAPPER_PARTS", "canonical_name", "module_type_of"]

# Path parts of the wrappers of PEFT and torch.compile. A unit keeps its name when a model is wrapped, so that reports,
# adapters and caches of the plain model fit the wrapped one.
WRAPPER_PARTS = frozenset({"base_layer", "original_module", "_orig_mod"})

_ADAPTER_PREFIX = "base_model.model."  # PeftModel puts this before every name


def canonical_name(name: str) -> str:
    """A parameter's or module's name without the parts that PEFT's wrappers and torch.compile add.

    >>> canonical_name("base_model.model.lm.layers.0.q_proj.base_layer.weight")
    'lm.layers.0.q_proj.weight'
    """
    name = name.removeprefix(_ADAPTER_PREFIX)
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def module_type_of(module_name: str) -> str:
    """The path of a module with every index replaced by `*`: the same for all layers.

    >>> module_type_of("model.layers.17.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module_name)  # whole parts only: `fc1` keeps its digit
