"""Reading tensors and slices from safetensors files, and errors that name the damaged file."""

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from condft.weights.safetensors_file import INDEX_FILE, SINGLE_FILE, open_shards

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool]


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def save_sharded(folder: Path, **shards: dict[str, Tensor]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    save_sharded(tmp_path, one={"a": torch.ones(3, 2)}, two={"b": torch.zeros(4), "c": torch.arange(6.0)})
    return tmp_path


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=5))
def test_every_tensor_and_every_slice_come_back(specs: list[tuple[torch.dtype, list[int]]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(specs)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / SINGLE_FILE, metadata={"format": "pt"})
        stored = open_shards(Path(folder))
        assert stored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert same_bits(stored[key].read(), tensor)
            for index in range(tensor.shape[0] if tensor.ndim else 0):
                assert same_bits(stored[key].read_slice(index), tensor[index].contiguous())


def test_a_slice_that_is_not_there(two_shards: Path) -> None:
    with pytest.raises(IndexError, match=r"a of shape .3, 2. has no entry 3"):
        open_shards(two_shards)["a"].read_slice(3)


def test_shards_are_joined_by_the_index(two_shards: Path) -> None:
    stored = open_shards(two_shards)
    assert {key: tensor.file.name for key, tensor in stored.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
        "c": "two.safetensors",
    }


def test_the_single_file_goes_before_the_index(two_shards: Path) -> None:
    save_file({"only": torch.ones(1)}, two_shards / SINGLE_FILE)
    assert open_shards(two_shards).keys() == {"only"}


def test_a_missing_shard(two_shards: Path) -> None:
    (two_shards / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 shards .* are missing, the first is two.safetensors"):
        open_shards(two_shards)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard(two_shards: Path, keep: int) -> None:
    shard = two_shards / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"two\.safetensors is damaged: .*cut off"):
        open_shards(two_shards)


@pytest.mark.parametrize("length", [2**62, 200 * 2**20])
def test_an_oversized_header(two_shards: Path, length: int) -> None:
    shard = two_shards / "one.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"one\.safetensors is damaged: .*header"):
        open_shards(two_shards)


def test_a_corrupt_header(two_shards: Path) -> None:
    shard = two_shards / "one.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'{"a"', b'{"a}'))
    with pytest.raises(ValueError, match=r"one\.safetensors is damaged"):
        open_shards(two_shards)


def test_a_git_lfs_pointer(two_shards: Path) -> None:
    (two_shards / "one.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_shards(two_shards)


@pytest.mark.parametrize(
    ("key", "shard", "message"),
    [
        ("ghost", "one.safetensors", "ghost is in one.safetensors, but no shard has it"),
        ("b", "one.safetensors", "b is in one.safetensors, but it is in two.safetensors"),
        ("a", "../outside.safetensors", "outside its folder"),
    ],
)
def test_a_lying_index(two_shards: Path, key: str, shard: str, message: str) -> None:
    index = json.loads((two_shards / INDEX_FILE).read_text())
    index["weight_map"][key] = shard
    (two_shards / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{INDEX_FILE}.*{message}"):
        open_shards(two_shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(two_shards: Path, text: str) -> None:
    (two_shards / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX_FILE} is no index"):
        open_shards(two_shards)


def test_one_key_in_two_shards(two_shards: Path) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.ones(1)}, two_shards / "one.safetensors")
    with pytest.raises(ValueError, match="ambiguous"):
        open_shards(two_shards)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin.*save_pretrained"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("adapter_config.json", "adapter"), ("consolidated.safetensors", "it has consolidated"), ("x", "no safetensors")],
)
def test_no_weights_of_the_expected_name(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=message):
        open_shards(tmp_path)


def test_a_file_cut_off_after_opening(two_shards: Path) -> None:
    stored = open_shards(two_shards)
    shard = two_shards / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"two\.safetensors ends inside c"):
        stored["c"].read()
