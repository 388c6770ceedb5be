"""Checks an adapter's file: it must hold every copy in its shape, and no tensor that the adapter does not have.

PEFT (0.21) only warns if tensors are missing, and it writes a tensor that has the name of a base weight into the base.
"""

from collections.abc import Iterator, Mapping

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from condft.tuner.layers.base import CondFTLayer
from condft.tuner.registration import PREFIX
from condft.weights.names import canonical_name

__all__ = ["check_adapter_file"]


def check_adapter_file(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Compares a file's tensors with an adapter's copies in the model.

    Args:
        model: With the adapter in place.
        adapter_name: Its name.
        state_dict: The file's tensors, under their names in the model.

    Raises:
        ValueError: The file lacks a copy or has it in another shape, or holds tensors that do not belong to the
            adapter. The message has the first one's name and their number.
    """
    expected: dict[str, torch.Size] = {
        f"{path}.{attribute}.{adapter_name}": getattr(module, attribute)[adapter_name].shape
        for path, module in model.named_modules()
        if isinstance(module, CondFTLayer)
        for attribute in module.adapter_layer_names
        if adapter_name in getattr(module, attribute)
    }
    found = {key: value.shape for key, value in state_dict.items() if f".{PREFIX}" in key}
    problems: list[str] = []
    for key in sorted(expected.keys() | found.keys()):
        # None for a key that one side lacks, so this finds absent copies too.
        if expected.get(key) != found.get(key):
            here, there = _shape(expected.get(key)), _shape(found.get(key))
            problems.append(f"{canonical_name(key)}: {here} in the model, {there} in the file")
    if problems:
        raise ValueError(
            f"the adapter file does not fit this base model: {len(problems)} of {len(expected)} weights differ, the "
            f"first is {problems[0]}. Load the base model that the adapter's config names."
        )
    further = set(_further_tensors(model, adapter_name))
    foreign = sorted(key for key in state_dict.keys() - found.keys() - further if not _is_embedding(key))
    if foreign:
        raise ValueError(
            f"the adapter file holds {len(foreign)} tensors that are not the adapter's, the first is {foreign[0]!r}: "
            "an adapter has its copies (condft_...), modules_to_save and token rows only. Download or save the file "
            "again, or name the module in modules_to_save."
        )


def _further_tensors(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Names in the model of the tensors that `modules_to_save` and `trainable_token_indices` add to an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in module.adapter_state_dict_load_map(adapter_name).values():
                yield f"{path}.{key}"


def _is_embedding(key: str) -> bool:
    """Embeddings are allowed: PEFT adds whole embeddings to an adapter's file if the vocabulary was resized."""
    return not set(EMBEDDING_LAYER_NAMES).isdisjoint(key.split("."))


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
