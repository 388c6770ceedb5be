"""Every bit of a tensor counts in both digests, its layout in memory does not."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from condft.files.hashing import tensor_digest, tensor_sha256, update_hash

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool]
both = pytest.mark.parametrize("digest", [tensor_digest, tensor_sha256])


@both
@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 5), max_size=3))
def test_any_flipped_bit_is_seen(
    digest: Callable[[Tensor], str], data: Any, dtype: torch.dtype, shape: list[int]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = digest(tensor)
    raw = tensor.clone().reshape(-1).view(torch.uint8)
    if dtype == torch.bool:  # only 0 and 1 are values of it
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(tensor.clone()) == before
    assert digest(raw.view(dtype).reshape(shape)) != before


@both
def test_shape_and_dtype_count_and_strides_do_not(digest: Callable[[Tensor], str]) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert digest(tensor) != digest(tensor.reshape(3, 2))
    assert digest(torch.zeros(2, dtype=torch.float16)) != digest(torch.zeros(2, dtype=torch.bfloat16))
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    assert digest(torch.empty(0)) != digest(torch.empty(0, 1))


@both
def test_reading_in_pieces_changes_nothing(digest: Callable[[Tensor], str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, dtype=torch.float64)
    whole = digest(tensor)
    monkeypatch.setattr("condft.files.hashing._PIECE_BYTES", 24)
    assert digest(tensor) == whole


def test_a_hash_over_several_tensors_goes_on_with_each() -> None:
    first, second = torch.ones(2, dtype=torch.bfloat16), torch.zeros(3, 1)
    hasher = hashlib.sha256(b"name ")
    update_hash(hasher, first)
    update_hash(hasher, second)
    raw = b"name torch.bfloat16 (2,)" + first.view(torch.uint8).numpy().tobytes() + b"torch.float32 (3, 1)" + bytes(12)
    assert hasher.hexdigest() == hashlib.sha256(raw).hexdigest()
    with pytest.raises(ValueError, match="meta device"):
        update_hash(hasher, torch.empty(2, device="meta"))
