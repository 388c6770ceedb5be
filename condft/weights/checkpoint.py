"""A checkpoint that is never instantiated: its model on the meta device, its weights read one at a time.

The model is built from the config on the meta device, which gives names, shapes, roles and ties without memory;
`key_mapping` finds each parameter in the files. A weight has the values and the dtype that
`from_pretrained(dtype="auto")` would load: the dtype that the config names (nearly always the stored one), or that of
the files if it names none. So a report of the files equals one of the loaded model, row for row.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condft.files.hub import hub_errors
from condft.weights.key_mapping import StoredWeights, map_keys, tied_names
from condft.weights.names import canonical_name
from condft.weights.safetensors_file import INDEX_FILE, SINGLE_FILE, StoredTensor, open_shards, shard_names

__all__ = ["Checkpoint", "checkpoint_folder", "open_checkpoint", "stored_weights"]


@dataclass(frozen=True)
class Checkpoint:
    """A transformers checkpoint with its config, and the places of its tensors in the files.

    Attributes:
        folder: Where its files are (for a hub id, in the hub's cache).
        config: transformers' config.
        tensors: Key in the files -> stored tensor.
    """

    folder: Path
    config: Any
    tensors: dict[str, StoredTensor]

    @property
    def quantization(self) -> str | None:
        """The quantization method that the config names."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method", "quantized")))

    def build_model(self, *, trust_remote_code: bool = False) -> nn.Module:
        """The model of the config on the meta device: no weights, no memory.

        Raises:
            ValueError: The config names no architecture that the installed transformers has.
        """
        import transformers

        names = self.config.architectures or []
        known = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        # The checkpoint's own code first, if it is trusted: transformers may have a class of the same name.
        if trust_remote_code and _auto_class(self.config) is not None:
            build = getattr(transformers, str(_auto_class(self.config))).from_config
            return _on_meta(build, self.config, dtype=self._dtype(), trust_remote_code=True)
        if known is None:
            raise ValueError(
                f"{self.folder}/config.json names the architecture {names or 'nothing'}, which transformers "
                f"{transformers.__version__} does not have: upgrade it, or pass a loaded model instead"
            )
        return _on_meta(known._from_config, self.config, dtype=self._dtype())

    def weights_for(self, model: nn.Module) -> StoredWeights:
        """Finds the parameters of a model that `build_model` made in the files.

        Tied parameters with different values in the files are untied in `model`, as `from_pretrained` does.

        Raises:
            ValueError: Stored tensors that cannot be converted.
        """
        weights = map_keys(model, self.tensors, self.quantization)
        for names in tied_names(model):
            first, *others = [name for name in names if name in weights.deferred] or [""]
            for name in others:
                # Mostly both names have one place in the files. With two, their values show whether they are tied.
                one, other = weights.deferred[first], weights.deferred[name]
                if one is not other and not torch.equal(one.read(), other.read()):
                    _untie(model, name)
        return weights

    def _dtype(self) -> torch.dtype:
        if self.config.dtype is not None:
            return getattr(torch, self.config.dtype) if isinstance(self.config.dtype, str) else self.config.dtype
        # Not integers and not float8: these mostly are the codes of a quantized weight.
        plain = (t.dtype for t in self.tensors.values() if t.dtype.is_floating_point and t.dtype.itemsize > 1)
        return next(plain, torch.get_default_dtype())


def open_checkpoint(path: str | Path, *, trust_remote_code: bool = False, download: bool = True) -> Checkpoint:
    """Opens a checkpoint's config and safetensors files; reads no weights.

    Args:
        path: A folder with `config.json` and safetensors weights, or a hub id, of which only these are fetched.
        trust_remote_code: Passed on to transformers, which then runs code of the repository.
        download: Whether a hub id may be downloaded; if not, it must be in the hub's cache.

    Raises:
        FileNotFoundError: No such folder or hub repository, no config, no safetensors, or a shard is missing.
        ValueError: A damaged file (the message names it), or a config that transformers does not know.
    """
    import transformers

    folder = checkpoint_folder(path, trust_remote_code=trust_remote_code, download=download)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError as error:  # transformers (5.23) raises OSError for a config that is not JSON or lacks its code
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    return Checkpoint(folder, config, open_shards(folder))


def checkpoint_folder(path: str | Path, *, trust_remote_code: bool = False, download: bool = True) -> Path:
    """Where a checkpoint's files are; arguments and errors as of `open_checkpoint`, but no file is opened."""
    folder = _resolve(path, trust_remote_code, download)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no config.json")
    return folder


def stored_weights(model: nn.Module) -> StoredWeights | str:
    """The checkpoint that a live model names as its source, mapped to the model's names (without wrappers).

    Args:
        model: A transformers model, also in PEFT's or torch.compile's wrappers.

    Returns:
        The stored weights, or a string that says why there are none.
    """
    inner = _innermost(model)
    if inner is None:
        return "not a transformers model"
    source = inner.name_or_path or getattr(inner.config, "_name_or_path", "")
    if not source:
        return "the model names no checkpoint"
    try:
        # No download: a look at a live model must not fetch gigabytes.
        checkpoint = open_checkpoint(source, download=False)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    # The parameters of a wrapped model have other names. A plain model of the same class has those of the files.
    return checkpoint.weights_for(_on_meta(type(inner)._from_config, inner.config, dtype=inner.config.dtype))


def _innermost(model: nn.Module) -> Any:
    """The transformers model inside the wrappers, with the canonical names; None if there is none."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        # Its path must consist of wrapper parts only: then a parameter right inside it has no prefix.
        if isinstance(module, PreTrainedModel) and canonical_name(f"{path}.weight".removeprefix(".")) == "weight":
            return module
    return None


def _on_meta(build: Any, config: Any, **options: Any) -> nn.Module:
    from transformers.initialization import meta_device_safe_creation_ops

    # Remote code may call `.item()` on a torch.linspace while it is built, so transformers makes these on the CPU.
    with torch.device("meta"), meta_device_safe_creation_ops():
        # A copy: transformers (5.23) writes the dtype into the config that it builds from.
        model: nn.Module = build(copy.deepcopy(config), **options)
    model.eval()
    return model


def _untie(model: nn.Module, name: str) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    # Still on the meta device: a tie is seen by identity, so another object is enough.
    setattr(module, key, nn.Parameter(torch.empty_like(getattr(module, key))))


def _auto_class(config: Any) -> str | None:
    """The transformers Auto class through which a checkpoint's own code offers the architecture of its config."""
    offered = getattr(config, "auto_map", None) or {}
    for name in config.architectures or ():
        for auto_class, reference in offered.items():
            if str(reference).rpartition(".")[2] == name:  # the reference is such as `modeling_x.XForCausalLM`
                return str(auto_class)
    return None


def _resolve(path: str | Path, trust_remote_code: bool, download: bool) -> Path:
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub

    def fetch(patterns: list[str], revision: str | None = None) -> Path:
        folder = huggingface_hub.snapshot_download(
            str(path), revision=revision, allow_patterns=patterns, local_files_only=not download
        )
        return Path(folder)

    with hub_errors(f"{path} is no checkpoint folder"):
        code = ["*.py"] if trust_remote_code else []
        folder = fetch(["config.json", SINGLE_FILE, INDEX_FILE, *code])
        if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
            # Only the shards that the index names: a repository may hold the weights a second time in another layout.
            # The hub's cache names the folder by its commit, so both fetches are of one revision.
            fetch(shard_names(folder), revision=folder.name)
    return folder
