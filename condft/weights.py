"""Walks a live model or a checkpoint folder and yields its units: what can be scored, and why the rest cannot."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condft.report import Role, SkippedWeight, SkipReason

__all__ = ["Unit", "canonical_name", "iter_units", "load_checkpoint", "module_type_of", "tensor_digest"]

# Wrappers that PEFT and torch.compile put around a module; a unit keeps the name it has without them.
_WRAPPER_PARTS = frozenset({"base_layer", "original_module", "_orig_mod"})
_DIGEST_BYTES = 64 * 2**20
_ADAPTER_PREFIX = "base_model.model."
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs", "embed_out"})
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Unit:
    """One thing to score and, if chosen, to train.

    Attributes:
        name: Parameter name in the model without wrappers, `[i]` appended for slice i of a stack.
        tensor: The unit's weight, in its own shape and dtype; a view of the model's memory, not a copy.
        matrix: The same entries as the matrix to analyze: `(out, in * kernel)` for a convolution.
        module_type: Module path with layer indices replaced by `*`.
        role: What the unit is for.
    """

    name: str
    tensor: Tensor
    matrix: Tensor
    module_type: str
    role: Role


def canonical_name(name: str) -> str:
    """A parameter's or module's name without the parts that PEFT's wrappers and torch.compile add.

    >>> canonical_name("base_model.model.lm.layers.0.q_proj.base_layer.weight")
    'lm.layers.0.q_proj.weight'
    """
    name = name.removeprefix(_ADAPTER_PREFIX)
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def module_type_of(module_name: str) -> str:
    """The module's path with every index replaced by `*`: equal for the same place in every layer.

    >>> module_type_of("model.layers.17.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module_name)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 (64 hex digits) over dtype, shape and raw bytes of a tensor of any dtype or device.

    Read in pieces, so that a large tensor on a GPU is never copied whole.

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values to hash; load the weights first")
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _DIGEST_BYTES // flat.element_size())):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Loads a transformers checkpoint folder in its stored dtype, from safetensors only.

    Args:
        path: Folder with `config.json` and safetensors weights.
        trust_remote_code: Passed on to transformers; off unless asked for.

    Raises:
        FileNotFoundError: No such folder, or no `config.json` in it.
        ValueError: The config names no architecture that the installed transformers has.
    """
    import transformers  # costs seconds; a caller with a live model has paid already, others need not

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    names = config.architectures or []
    known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    loader = known[0] if known else transformers.AutoModel if trust_remote_code else None
    if loader is None:
        raise ValueError(
            f"{folder}/config.json names the architecture {names or 'nothing'}, which transformers "
            f"{transformers.__version__} does not have: upgrade it, or pass a loaded model instead"
        )
    return loader.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code)


def iter_units(model: nn.Module) -> Iterator[Unit | SkippedWeight]:
    """Yields every unit of a model, and every parameter that is none with its reason, each tensor once.

    A tensor that several modules share (tied embeddings) is yielded under its first name and skipped as TIED
    under the others. Tensors of more than two dimensions are read by their module: convolutions as one matrix
    `(out, in * kernel)`, any other as a stack of matrices over the leading dimensions, one unit a slice.
    """
    special = _special_modules(model)
    seen: dict[int, str] = {}
    adapters: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            adapters.add(path)
        name = canonical_name(path)
        inside_adapter = _is_adapter_part(path, adapters)
        for key, parameter in _own_weights(module):
            full = f"{name}.{key}" if name else key
            if inside_adapter:
                yield _skip(full, parameter, SkipReason.ADAPTER)
            elif id(parameter) in seen:
                yield _skip(full, parameter, SkipReason.TIED, f"shares its memory with {seen[id(parameter)]}")
            else:
                seen[id(parameter)] = full
                role = special.get(id(module)) or _role(model, path, module, key)
                yield from _units_of(full, module_type_of(name), module, parameter, role)


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    if nn.utils.parametrize.is_parametrized(module):
        # The weight that acts is computed; its parts (`parametrizations.weight.original`) are not what is applied.
        for key in module.parametrizations:  # type: ignore[union-attr]
            yield key, getattr(module, key)


def _is_adapter_part(path: str, adapters: set[str]) -> bool:
    """Whether a module lies in an adapter wrapper, but not in the base layer that it wraps."""
    parts = path.split(".")
    for depth in range(len(parts) + 1):
        if ".".join(parts[:depth]) in adapters and (depth == len(parts) or parts[depth] not in _WRAPPER_PARTS):
            return True
    return ".parametrizations." in f".{path}."


def _special_modules(model: nn.Module) -> dict[int, Role]:
    """Roles that a transformers model tells by itself: its input embeddings and its output head."""
    roles: dict[int, Role] = {}
    for module in model.modules():
        for getter, role in (
            ("get_output_embeddings", Role.OUTPUT_HEAD),
            ("get_input_embeddings", Role.EMBEDDING),
        ):
            found = _call_getter(module, getter)
            if isinstance(found, nn.Module):
                roles[id(getattr(found, "base_layer", found))] = role
    return roles


def _call_getter(module: nn.Module, getter: str) -> Any:
    method = getattr(type(module), getter, None)
    if method is None:
        return None
    try:
        return method(module)
    except (NotImplementedError, AttributeError):  # transformers' way to say that this model has none
        return None


def _role(model: nn.Module, path: str, module: nn.Module, key: str) -> Role:
    last = canonical_name(path).rpartition(".")[2]
    parent_path = path.rpartition(".")[0]
    if isinstance(module, nn.Embedding):
        return Role.EMBEDDING
    if last in _HEAD_NAMES:
        return Role.OUTPUT_HEAD
    if "Router" in type(module).__name__:
        return Role.ROUTER
    if last in _ROUTER_NAMES and hasattr(model.get_submodule(parent_path), "experts"):
        return Role.ROUTER
    if key == "weight" and (
        isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
    ):
        return Role.LAYER
    if "expert" in f"{path}.{key}".lower():
        return Role.EXPERT
    return Role.PARAMETER


def _units_of(
    name: str, module_type: str, module: nn.Module, tensor: Tensor, role: Role
) -> Iterator[Unit | SkippedWeight]:
    reason = _reason_to_skip(tensor)
    if reason is not None:
        detail = str(tensor.dtype).removeprefix("torch.") if reason is SkipReason.NOT_FLOATING else ""
        yield _skip(name, tensor, reason, detail)
    elif tensor.ndim == 2:
        yield Unit(name, tensor, tensor, module_type, role)
    elif isinstance(module, _CONVOLUTIONS):
        yield Unit(name, tensor, tensor.flatten(1), module_type, role)
    else:
        # Fused stacks hold several matrices in one module: the parameter's name tells gate_up from down.
        stack_type = f"{module_type}.{name.rpartition('.')[2]}"
        slices = tensor.detach().flatten(0, -3)
        for index, matrix in enumerate(slices):
            yield Unit(f"{name}[{index}]", matrix, matrix, stack_type, role)


def _reason_to_skip(tensor: Tensor) -> SkipReason | None:
    if tensor.ndim < 2:
        return SkipReason.FEWER_THAN_TWO_DIMENSIONS
    if not tensor.dtype.is_floating_point:
        return SkipReason.NOT_FLOATING
    if tensor.numel() == 0:
        return SkipReason.EMPTY
    return SkipReason.META_DEVICE if tensor.is_meta else None


def _skip(name: str, tensor: Tensor, reason: SkipReason, detail: str = "") -> SkippedWeight:
    return SkippedWeight(name, tuple(tensor.shape), reason, detail)
