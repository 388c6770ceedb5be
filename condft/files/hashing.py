"""Digests of tensors: which weights were looked at (fast), and proof that none has changed (cryptographic)."""

import hashlib
from typing import Protocol

import torch
import xxhash
from torch import Tensor

__all__ = ["tensor_digest", "tensor_sha256"]

_PIECE_BYTES = 64 * 2**20


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def tensor_digest(tensor: Tensor) -> str:
    """XXH3-128 (32 hex digits) over dtype, shape and raw bytes of a tensor of any dtype or device.

    As fast as memory is read, which a start from the cache needs; two weights have the same one by chance with a
    probability of 2**-128, but it is no protection against somebody who wants them to (`tensor_sha256` is).

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    return _digest(xxhash.xxh3_128(_header(tensor)), tensor)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (64 hex digits) over the same.

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    return _digest(hashlib.sha256(_header(tensor)), tensor)


def _header(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode()


def _digest(hasher: _Hasher, tensor: Tensor) -> str:
    """Read in pieces, so that a large tensor on a GPU is never copied whole."""
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values to hash; load the weights first")
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _PIECE_BYTES // flat.element_size())):
        hasher.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
