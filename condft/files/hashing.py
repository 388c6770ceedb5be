"""Hashes of tensors: a fast one to recognize weights, and a cryptographic one to prove that none has changed."""

import hashlib
from typing import Protocol

import torch
import xxhash
from torch import Tensor

__all__ = ["tensor_digest", "tensor_sha256", "update_hash"]

_PIECE_BYTES = 64 * 2**20


class Hasher(Protocol):
    """What the hashes of `hashlib` and `xxhash` have in common."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def tensor_digest(tensor: Tensor) -> str:
    """XXH3-128 (32 hex digits) over dtype, shape and raw bytes of a tensor of any dtype or device.

    It is as fast as memory is read, which a start from the cache needs. Two different weights have the same hash with
    a probability of 2**-128, but a weight can be forged to have a given hash: `tensor_sha256` protects against that.

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    hasher = xxhash.xxh3_128()
    update_hash(hasher, tensor)
    return hasher.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (64 hex digits) over dtype, shape and raw bytes of a tensor, as `tensor_digest`.

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    hasher = hashlib.sha256()
    update_hash(hasher, tensor)
    return hasher.hexdigest()


def update_hash(hasher: Hasher, tensor: Tensor) -> None:
    """Adds dtype, shape and raw bytes of a tensor to a hash that goes on over more than this tensor.

    The tensor is read in pieces, so that a large one on a GPU is never copied whole.

    Args:
        hasher: Of `hashlib` or `xxhash`.
        tensor: Any dtype, device and layout; equal values in another layout give the same hash.

    Raises:
        ValueError: A tensor on the meta device: it has no bytes.
    """
    if tensor.is_meta:
        raise ValueError("a tensor on the meta device has no values to hash; load the weights first")
    # Otherwise (2, 3) and (3, 2) of the same bytes would have one hash, and so would zeros of two dtypes.
    hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    # In row-major order, so that strides do not count. Detached: numpy() refuses tensors that require gradients.
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _PIECE_BYTES // flat.element_size())):
        # As bytes first: numpy has no bfloat16 and no float8.
        hasher.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
