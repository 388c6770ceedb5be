"""Adapter files that are damaged, foreign or malicious."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from condft import CondFTConfig
from condft.tuner import load
from tests.helpers.models.adapters import train
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import logits

NAME = "adapter_model.safetensors"


@pytest.fixture
def saved(saved_adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return shutil.copytree(saved_adapter, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_file_cut_short_is_refused(saved: Path, length: int) -> None:
    data = (saved / NAME).read_bytes()
    (saved / NAME).write_bytes(data[:length])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(build_tiny_llama(), saved)
    with pytest.raises(SafetensorError):
        build_tiny_llama().load_adapter(str(saved))
    with pytest.raises(ValueError, match=rf"{NAME} is cut short or damaged \(.*\): download or save it again"):
        load(saved, build_tiny_llama())


def test_foreign_tensors_are_refused_and_reach_no_base_weight(saved: Path) -> None:
    """PEFT itself would write the second one into the base model."""
    foreign = {"base_model.model.model.norm.weight": torch.zeros(32), "something.else": torch.zeros(2)}
    save_file(load_file(saved / NAME) | foreign, saved / NAME)
    base = build_tiny_llama()
    with pytest.raises(ValueError, match=r"holds 2 tensors .* the first is 'base_model.model.model.norm.weight'"):
        PeftModel.from_pretrained(base, saved)
    assert torch.equal(base.model.norm.weight, build_tiny_llama().model.norm.weight)


def test_embeddings_that_peft_adds_are_not_foreign(tmp_path: Path, token_ids: Tensor) -> None:
    def resized() -> Any:
        model = build_tiny_llama(tied=False)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model.resize_token_embeddings(100, mean_resizing=False)
        return model

    model = get_peft_model(resized(), CondFTConfig(num_tensors=3))
    train(model, token_ids)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len(load_file(tmp_path / NAME)) == 3 + 2
    loaded = PeftModel.from_pretrained(resized(), tmp_path)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_modules_token_rows_and_biases_are_not_foreign(
    tmp_path: Path, token_ids: Tensor, low_cpu_mem_usage: bool
) -> None:
    config = CondFTConfig(
        num_tensors=3, modules_to_save=["norm"], trainable_token_indices={"embed_tokens": [7, 2]}, bias="selected"
    )
    model = get_peft_model(build_tiny_llama(tied=False), config)
    train(model, token_ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_tiny_llama(tied=False), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))


def _with_a_given_config(folder: Path) -> None:
    PeftModel.from_pretrained(build_tiny_llama(), folder, config=CondFTConfig.from_pretrained(folder))


def _swapped_in(folder: Path) -> None:
    model = get_peft_model(build_tiny_llama(), CondFTConfig.from_pretrained(folder))
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")


DOORS: dict[str, Callable[[Path], Any]] = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(build_tiny_llama(), folder),
    "with a config": _with_a_given_config,
    "hotswap_adapter": _swapped_in,
    "condft.load": lambda folder: load(folder, build_tiny_llama()),
    "transformers": lambda folder: build_tiny_llama().load_adapter(str(folder), use_safetensors=False),
}


class Exploit:
    """Unpickled by Python's own unpickler, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def _write_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


PICKLES: dict[str, Callable[[Any, Path], None]] = {"zip": torch.save, "legacy": _write_legacy}


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_pickle_that_runs_code_is_refused(
    saved: Path, door: Callable[[Path], Any], write: Callable[[Any, Path], None]
) -> None:
    """PEFT 0.21 and transformers 5.20 read pickles with `weights_only=True`: condft adds nothing to that."""
    (saved / NAME).unlink()
    file, trace = saved / "adapter_model.bin", saved / "trace"
    write({"weight": Exploit(trace)}, file)
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir"):
        door(saved)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the file does run code where a reader lets it
    assert trace.is_dir()


@pytest.mark.parametrize("door", [name for name in DOORS if name != "transformers"])  # which reports and ignores them
def test_a_pickle_of_foreign_tensors_is_checked_as_any_file(saved: Path, door: str) -> None:
    torch.save(load_file(saved / NAME) | {"something.else": torch.zeros(2)}, saved / "adapter_model.bin")
    (saved / NAME).unlink()
    with pytest.raises(ValueError, match=r"holds 1 tensors that are not the adapter's"):
        DOORS[door](saved)


def test_a_pickle_of_tensors_is_read_as_peft_reads_it(saved: Path, token_ids: Tensor) -> None:
    model = PeftModel.from_pretrained(build_tiny_llama(), saved)
    model.save_pretrained(saved / "pickled", safe_serialization=False)
    loaded = PeftModel.from_pretrained(build_tiny_llama(), saved / "pickled")
    assert torch.equal(logits(loaded, token_ids), logits(model, token_ids))
