"""What weights and modules are called: names without wrappers, and the type that a module's place gives it."""

import re

__all__ = ["WRAPPER_PARTS", "canonical_name", "module_type_of"]

# Wrappers that PEFT and torch.compile put around a module; a unit keeps the name it has without them.
WRAPPER_PARTS = frozenset({"base_layer", "original_module", "_orig_mod"})

_ADAPTER_PREFIX = "base_model.model."


def canonical_name(name: str) -> str:
    """A parameter's or module's name without the parts that PEFT's wrappers and torch.compile add.

    >>> canonical_name("base_model.model.lm.layers.0.q_proj.base_layer.weight")
    'lm.layers.0.q_proj.weight'
    """
    name = name.removeprefix(_ADAPTER_PREFIX)
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def module_type_of(module_name: str) -> str:
    """The module's path with every index replaced by `*`: equal for the same place in every layer.

    >>> module_type_of("model.layers.17.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module_name)
