"""What an adapter changed: pairs of a trained parameter and the base parameter that it replaces."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.layers.slices import Slices
from condft.weights.names import canonical_name
from condft.weights.shards import is_dtensor

__all__ = ["Update", "iter_updates"]


# eq=False, since `==` of two tensors is a tensor and no answer.
@dataclass(frozen=True, eq=False)
class Update:
    """One parameter that an adapter trains.

    Attributes:
        name: The parameter's name in the base model.
        base: All of its values in the base model (dequantized, if the base is quantized).
        trained: The adapter's values, in the dtype that was trained: of the whole parameter, or of the slices that
            train.
        slices: Which slices train; None for the whole parameter.
        layer: The base model's module that is wrapped.
        selected: True for a weight that CondFT selected, False for `modules_to_save` and token rows.
    """

    name: str
    base: Tensor
    trained: Tensor
    slices: Slices | None
    layer: nn.Module
    selected: bool

    def difference(self) -> Tensor:
        """`trained - base`, in the shape of `trained`, in fp32 or in the wider dtype if one of them is wider."""
        base = self.base if self.slices is None else self.slices.take(self.base)
        # In fp32 at least: for most weights the difference then has no rounding error (see `export.delta`).
        wide = torch.promote_types(torch.promote_types(base.dtype, self.trained.dtype), torch.float32)
        return self.trained.to(wide) - base.to(self.trained.device, wide)

    def dense_difference(self) -> Tensor:
        """The difference in the parameter's whole shape, zero outside of the slices."""
        part = self.difference()
        if self.slices is None:
            return part
        whole = part.new_zeros(self.base.shape)
        self.slices.write(whole, part)
        return whole


def iter_updates(model: nn.Module, adapter_name: str = "default") -> Iterator[Update]:
    """Yields everything that an adapter trains, each parameter once. The model is not changed.

    Args:
        model: A model with the adapter, made by `get_peft_model`, `PeftModel.from_pretrained` or `add_adapter`.
        adapter_name: Which adapter.

    Raises:
        ValueError: The model has no such adapter; an adapter is merged, so the base weights cannot be read; weights
            are sharded; or a saved module is tied to another one in the base model.
    """
    _refuse_merged(model)  # the base layer would hold trained values
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A parameter that a wrapper shows under two paths has one canonical name, and is not tied.
        if canonical_name(name) not in names_of.setdefault(id(parameter), []):
            names_of[id(parameter)].append(canonical_name(name))
    found = False
    for path, module in model.named_modules():
        for update in _updates_of(canonical_name(path), module, adapter_name, names_of):
            found = True
            if is_dtensor(update.trained) or is_dtensor(update.base):
                raise ValueError(
                    f"{update.name} is sharded over several processes: save the adapter, and export from its folder"
                )
            yield update
    if not found:
        known = sorted(getattr(model, "peft_config", {}))
        raise ValueError(f"the model has no adapter {adapter_name!r} that trains a weight; its adapters are {known}")


def _updates_of(name: str, module: nn.Module, adapter: str, names_of: dict[int, list[str]]) -> Iterator[Update]:
    if isinstance(module, CondFTLayer):
        for key, slices, copy in module.parts_of(adapter):
            yield Update(
                f"{name}.{key}", module.base_values(key), copy.detach(), slices, module.get_base_layer(), True
            )
    elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        saved = dict(module.modules_to_save[adapter].named_parameters())
        for key, base in module.original_module.named_parameters():
            _refuse_tied(f"{name}.{key}", names_of[id(base)])
            yield Update(f"{name}.{key}", base.detach(), saved[key].detach(), None, module.original_module, False)
    elif isinstance(module, TrainableTokensWrapper):
        rows: Any = module.token_adapter
        # The wrapper of a tied module has the same rows a second time, under that module's name.
        if rows.tied_adapter is None and adapter in rows.trainable_tokens_delta:
            indices = rows.token_indices[adapter]
            slices = Slices.joined(0, ((index, index + 1) for index in indices))
            # Slices are ascending, and PEFT keeps the rows in the order of the config.
            ascending = torch.tensor(indices).argsort()
            trained = rows.trainable_tokens_delta[adapter].detach()[ascending]
            layer = rows.get_base_layer()
            yield Update(f"{name}.weight", layer.weight.detach(), trained, slices, layer, False)


def _refuse_merged(model: nn.Module) -> None:
    for path, module in model.named_modules():
        # PEFT's wrappers have an empty list if nothing is merged; other modules have no such attribute.
        if getattr(module, "merged_adapters", None):
            raise ValueError(f"an adapter is merged into {canonical_name(path)}: call unmerge_adapter() first")


def _refuse_tied(name: str, names: list[str]) -> None:
    others = [other for other in names if other != name]
    if others:
        raise ValueError(
            f"{name} is trained as a saved module, but in the base model it is tied to {others[0]}: a difference "
            "would change both. Merge the adapter (merge_and_unload) instead, or load the base with "
            "tie_word_embeddings=False."
        )
