"""An adapter's update as a LoRA adapter, which servers that know only LoRA, such as vLLM, can load."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from condft.files.atomic import atomic_directory, write_text
from condft.tuner.export.updates import Update, iter_updates
from condft.tuner.loading.load import adapted

__all__ = ["LoraExport", "LoraFactors", "export_lora"]

_PREFIX = "base_model.model."
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoraFactors:
    """How well one weight's update is approximated.

    Attributes:
        name: The weight's name in the base model.
        rank: The rank of the two factors.
        full_rank: The rank at which the approximation is exact up to rounding.
        relative_error: Frobenius norm of (update - approximation) over that of the update.
    """

    name: str
    rank: int
    full_rank: int
    relative_error: float


@dataclass(frozen=True)
class LoraExport:
    """How well the adapter that `export_lora` wrote approximates the original one.

    Attributes:
        factors: One entry for each weight.
        left_out: Weight name -> why it is not in the LoRA adapter. For an unchanged weight nothing is lost.
        relative_error: Over all updates together. An update that is left out counts as lost.

    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, LoraExport, export_lora
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=2, init_weights=False))
    >>> export = export_lora(model, "lora", max_error=0.5)
    >>> isinstance(export, LoraExport), export.left_out
    (True, {})
    >>> export.relative_error <= 0.5
    True
    >>> [factors.rank < factors.full_rank for factors in export.factors]
    [True, True]
    """

    factors: tuple[LoraFactors, ...]
    left_out: dict[str, str]
    relative_error: float


def export_lora(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    base: nn.Module | str | Path | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> LoraExport:
    """Writes the best approximation of an adapter by LoRA: a truncated SVD of each update (Eckart & Young 1936).

    The folder holds a LoRA adapter that `PeftModel.from_pretrained` loads without condft. `lora_alpha` equals the
    rank everywhere, so the scaling is exactly one. Saved modules and token rows are copied unchanged. The updates of
    full-rank training are not of low rank: look at the errors before you serve the result.

    Args:
        model: A model with the adapter, or the adapter's folder (or hub id).
        folder: Where to write. If it exists, all of it is replaced.
        rank: The rank of every weight's factors, at most its full rank.
        max_error: Instead of `rank`: each weight gets the smallest rank whose relative error is at most this.
        base: As for `export_delta`.
        adapter_name: Which adapter of a model.
        dtype: The dtype of the factors.

    Returns:
        Rank and error of every weight. They are also in the folder's README.md and in the file's metadata.

    Raises:
        ValueError: Not exactly one of `rank` and `max_error` is given, it is out of range, or none of the selected
            weights has a LoRA form.

    >>> from peft import PeftModel, get_peft_model
    >>> from condft import CondFTConfig, export_lora
    >>> base.save_pretrained("base")
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=2, init_weights=False))
    >>> [factors.rank for factors in export_lora(model, "lora", rank=8).factors]
    [8, 8]
    >>> served = PeftModel.from_pretrained(base.from_pretrained("base"), "lora")
    >>> served.peft_config["default"].peft_type.value
    'LORA'
    """
    _check_choice(rank, max_error)
    with adapted(model, base, adapter_name) as live:
        tensors, factors, left_out, squares = {}, [], {}, [0.0, 0.0]
        for update in iter_updates(live, adapter_name):
            if not update.selected:
                continue
            difference = update.dense_difference()
            # In fp64: the squares of all weights are added up for the total error.
            norm = torch.linalg.vector_norm(difference, dtype=torch.float64).item()
            # Unchanged first: a relative error would divide by zero.
            reason = "unchanged" if norm == 0.0 else _no_lora_form(update)
            squares[1] += norm**2
            if reason is not None:
                left_out[update.name] = reason
                squares[0] += norm**2
                continue
            matrix = _as_matrix(update.layer, difference)
            down, up = (factor.to(dtype) for factor in _factorize(matrix, norm, rank, max_error))
            # The error of the factors as they are written, including their rounding to `dtype`.
            lost = torch.linalg.vector_norm(matrix - up.to(matrix) @ down.to(matrix), dtype=torch.float64).item()
            factors.append(LoraFactors(update.name, len(down), min(matrix.shape), lost / norm))
            tensors.update(_keys(update, down, up))
            squares[0] += lost**2
        if not factors:
            raise ValueError(f"none of the {len(left_out)} selected weights has a LoRA form: {left_out}")
        export = LoraExport(tuple(factors), left_out, math.sqrt(squares[0] / squares[1]))
        tensors.update(_saved_modules(live, adapter_name))
        config = _lora_config(live, adapter_name, export)
    _write(Path(folder), tensors, config, export)
    return export


def _check_choice(rank: int | None, max_error: float | None) -> None:
    if (rank is None) == (max_error is None):
        raise ValueError("export_lora needs either rank or max_error, and not both")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: a LoRA needs at least rank 1")
    if max_error is not None and not 0.0 <= max_error < 1.0:
        raise ValueError(f"max_error={max_error} must lie in [0, 1): 1 would leave every update out")


def _no_lora_form(update: Update) -> str | None:
    layer = update.layer
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)):
        return f"no LoRA of one product for a parameter of a {type(layer).__name__}"
    if not update.name.endswith(".weight"):
        return "LoRA holds no bias"
    if isinstance(layer, _CONVOLUTIONS) and layer.groups != 1:
        return f"PEFT's LoRA cannot merge a convolution of {layer.groups} groups"
    if isinstance(layer, _CONVOLUTIONS) and (set(layer.dilation) != {1} or layer.padding_mode != "zeros"):
        return "PEFT's LoRA of a convolution knows neither dilation nor padding but with zeros"
    return None


def _as_matrix(layer: nn.Module, difference: Tensor) -> Tensor:
    """The difference as an `(outputs, inputs)` matrix, the shape of LoRA's `B @ A`."""
    # Conv1D holds (inputs, outputs), an embedding (tokens, outputs). A convolution's kernel counts as inputs.
    return difference.T if isinstance(layer, Conv1D | nn.Embedding) else difference.flatten(1)


def _factorize(matrix: Tensor, norm: float, rank: int | None, max_error: float | None) -> tuple[Tensor, Tensor]:
    """A `(rank, inputs)` and B `(outputs, rank)`, each scaled by the square roots of the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        assert max_error is not None
        # lost[r]: norm of the update that r kept singular values miss. Summed from the smallest value up, so that no
        # small square is lost in a large sum.
        lost = values.double().square().flip(0).cumsum(0).flip(0).sqrt().tolist()
        # At full rank nothing but rounding is lost, so there is always an answer.
        rank = next((r for r in range(1, len(lost)) if lost[r] <= max_error * norm), len(lost))
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _keys(update: Update, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The factors under the names and in the shapes that PEFT's LoRA gives them."""
    module, layer = _PREFIX + update.name.removesuffix(".weight"), update.layer
    if isinstance(layer, nn.Embedding):
        return {f"{module}.lora_embedding_A": down.contiguous(), f"{module}.lora_embedding_B": up.contiguous()}
    if isinstance(layer, _CONVOLUTIONS):
        kernel = layer.kernel_size
        down = down.reshape(len(down), layer.in_channels, *kernel)
        up = up.reshape(*up.shape, *[1] * len(kernel))
    # contiguous, since safetensors refuses other layouts.
    return {f"{module}.lora_A.weight": down.contiguous(), f"{module}.lora_B.weight": up.contiguous()}


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Saved modules and token rows, under the names of PEFT's files."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value.detach().clone() for key, value in saved.items() if ".condft_" not in key}


def _lora_config(model: Any, adapter_name: str, export: LoraExport) -> LoraConfig:
    ours = model.peft_config[adapter_name]
    names = [row.name.removesuffix(".weight") for row in export.factors]
    largest = max(row.rank for row in export.factors)
    # PEFT (0.21) allows any path before a pattern's match; ^ makes it match this weight alone.
    others = {
        f"^{re.escape(n)}": row.rank for n, row in zip(names, export.factors, strict=True) if row.rank != largest
    }
    chosen = set(names)
    modules = [path for path, _ in model.named_modules()]
    # PEFT matches a list of names by suffix, so it could select more modules than these. A regular expression has to
    # match the whole path.
    ambiguous = any(
        path.removeprefix(_PREFIX) not in chosen and ".base_layer" not in path and f".{path}".endswith(f".{name}")
        for path in modules
        for name in names
    )
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = {"base_model_class": type(base_model).__name__, "parent_library": type(base_model).__module__}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=others,
        alpha_pattern=others,  # alpha = rank, so that the scaling is exactly one
        target_modules="|".join(map(re.escape, names)) if ambiguous else names,
        modules_to_save=ours.modules_to_save,
        trainable_token_indices=ours.trainable_token_indices,
        base_model_name_or_path=ours.base_model_name_or_path or base_model.__dict__.get("name_or_path"),
        task_type=ours.task_type,
        auto_mapping=kind if ours.task_type is None else None,  # as PEFT itself saves it
        inference_mode=True,
    )


def _write(folder: Path, tensors: dict[str, Tensor], config: LoraConfig, export: LoraExport) -> None:
    rows = {row.name: {"rank": row.rank, "relative_error": row.relative_error} for row in export.factors}
    summary = {"relative_error": export.relative_error, "weights": rows, "left_out": export.left_out}
    metadata = {"format": "pt", "condft_lora": json.dumps(summary)}
    with atomic_directory(folder) as temporary:
        host = {key: value.cpu() for key, value in tensors.items()}
        save_file(host, temporary / "adapter_model.safetensors", metadata=metadata)
        config.save_pretrained(str(temporary))
        write_text(temporary / "README.md", _card(config, export))


def _card(config: LoraConfig, export: LoraExport) -> str:
    lines = ["---", "library_name: peft", "tags: [lora, condft]"]
    if config.base_model_name_or_path:
        lines.append(f"base_model: {json.dumps(config.base_model_name_or_path)}")
    lines += ["---", "", "# LoRA approximation of a CondFT adapter", ""]
    lines += [
        "The update of a full-rank CondFT adapter, each weight's cut to low rank by a truncated SVD. The relative",
        "error is the Frobenius norm of what was cut over that of the update: 0 is the adapter, 1 is the base model.",
        f"Over all weights together it is {export.relative_error:.4f}.",
        "",
        "| weight | rank | of | relative error |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {row.name} | {row.rank} | {row.full_rank} | {row.relative_error:.4f} |" for row in export.factors]
    if export.left_out:
        lines += ["", "Left out: " + "; ".join(f"{name} ({why})" for name, why in export.left_out.items()) + "."]
    return "\n".join(lines) + "\n"
