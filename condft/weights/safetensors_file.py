"""Safetensors files on disk: which tensors a checkpoint folder holds, and reading one of them or a slice of it.

Every file is opened and checked before the first tensor is read, so that a damaged checkpoint fails at once, and the
error names the file. The check is that of the safetensors library. The reading is a plain positioned read into a new
tensor: `safe_open` offers either a mapping, whose pages count as memory of the process until the file is closed, or
`pread`, which reads a whole stack to give one slice of it (measured with safetensors 0.8.0). The format:
https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

__all__ = ["INDEX_FILE", "SINGLE_FILE", "StoredTensor", "find_shards", "open_shards", "shard_names"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        key: Its name in the file.
        dtype: Its storage dtype.
        shape: Its shape.
        offset: Where its bytes begin, counted from the start of the file.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        """Reads the tensor into new memory.

        Raises:
            ValueError: The file ends too early: it was changed after it had been opened.
        """
        return self._read(self.shape, self.offset)

    def read_slice(self, index: int) -> Tensor:
        """Reads entry `index` of the leading dimension, and no other bytes.

        Raises:
            IndexError: There is no such entry.
            ValueError: As for `read`.
        """
        if not (self.shape and 0 <= index < self.shape[0]):
            raise IndexError(f"{self.file}: {self.key} of shape {self.shape} has no entry {index}")
        shape = self.shape[1:]
        return self._read(shape, self.offset + index * prod(shape) * self.dtype.itemsize)

    def _read(self, shape: tuple[int, ...], offset: int) -> Tensor:
        # As bytes, viewed as the dtype at the end: numpy has no bfloat16 and no float8.
        raw = torch.empty(prod(shape) * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        rest = raw.numpy().data
        with self.file.open("rb", buffering=0) as file:  # unbuffered: bytes go straight into the tensor
            file.seek(offset)
            while rest:
                count = file.readinto(rest)  # one call reads 2 GiB at most
                if not count:
                    raise ValueError(f"{self.file} ends inside {self.key}: it was cut off after it had been opened")
                rest = rest[count:]
        return raw.view(self.dtype).reshape(shape)


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: the single file, or all that the index names.

    Raises:
        FileNotFoundError: No safetensors, or a shard that the index names is missing.
        ValueError: The index is damaged.
    """
    if (folder / SINGLE_FILE).is_file():  # before the index, as transformers does
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(_no_safetensors(folder))
    names = shard_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the {len(names)} shards that {INDEX_FILE} names are missing, the first is "
            f"{missing[0]}. Download the checkpoint again, or complete it."
        )
    return [folder / name for name in names]


def shard_names(folder: Path) -> list[str]:
    """The names of all shards that the index of a folder names.

    Raises:
        ValueError: The index is damaged.
    """
    return sorted(set(_weight_map(folder).values()))


def open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Opens and checks every safetensors file of a checkpoint folder.

    Returns:
        Key -> where that tensor is, in the order of the files. No values are read.

    Raises:
        FileNotFoundError: No safetensors, or a shard is missing.
        ValueError: A file or the index is damaged, or they contradict each other; the message names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in find_shards(folder):
        for key, tensor in _read_header(file).items():
            if key in tensors:
                raise ValueError(f"{key} is both in {tensors[key].file} and in {file}: the checkpoint is ambiguous")
            tensors[key] = tensor
    if not (folder / SINGLE_FILE).is_file():
        _check_index(folder, tensors)
    return tensors


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for key, name in _weight_map(folder).items():
        if key not in tensors or tensors[key].file != folder / name:
            where = f"it is in {tensors[key].file.name}" if key in tensors else "no shard has it"
            raise ValueError(
                f"{folder / INDEX_FILE} says that {key} is in {name}, but {where}: the index and the shards do not "
                "belong together. Download the checkpoint again."
            )


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {key: PurePosixPath(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors shards: {error!r}") from error
    for name in names.values():
        # An index from a stranger's repository must not make this process read other files.
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{index} names a file outside its folder, {name}: it will not be read")
    return {key: str(name) for key, name in names.items()}


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    lacks = f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if pickles:
        return (
            f"{lacks}, only pickled weights ({pickles[0]}), which are not read because a pickle can run code. If you "
            "trust them, convert them once: AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
        )
    if (folder / "adapter_config.json").is_file():
        return f"{lacks}: it is an adapter. Analyze the base model, or the adapter merged into it."
    return f"{lacks}; it has {', '.join(others[:5]) or 'no safetensors at all'}."


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. safe_open checks sizes, offsets and overlaps; the header then gives their places."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. {_damage(file)}") from error
    with file.open("rb") as stream:
        # The format: the length of the header in 8 bytes, the header as JSON, then all values.
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise ValueError(f"{file} holds tensors of the dtypes {unknown}, which condft cannot read")
    return {
        key: StoredTensor(
            file, key, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for key, entry in header.items()
    }


def _damage(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer, not the weights: run `git lfs pull`."
    return f"The file has {size:,} bytes and was perhaps cut off: download it again."
