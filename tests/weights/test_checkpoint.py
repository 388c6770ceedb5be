"""A checkpoint that is never instantiated: folders, hub ids, own code, live models on meta, and its memory."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from condft import CondFTConfig, analyze
from condft.report import SkipReason
from condft.weights.checkpoint import open_checkpoint
from condft.weights.safetensors_file import SINGLE_FILE
from condft.weights.unit import load_ahead
from condft.weights.walk import iter_checkpoint_units, iter_units
from tests.helpers.models.tiny_checkpoints import SMALL, build, edit_config, split


def test_the_report_of_a_sharded_folder_is_the_live_models_row_for_row(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    live, stored = analyze(model, progress=False), analyze(tmp_path, progress=False)
    assert stored.rows == live.rows
    assert stored.skipped == live.skipped
    assert stored.fingerprint == live.fingerprint


def test_a_folder_without_config_and_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        analyze(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder, and no hub id either"):
        analyze(tmp_path / "not" / "there")
    with pytest.raises(FileNotFoundError, match="as a hub id it cannot be had"):
        analyze("nobody/nothing")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["NoSuchModel"])
    with pytest.raises(ValueError, match="NoSuchModel"):
        analyze(tmp_path)


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_a_hub_id_in_the_cache(shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    model = build("LlamaForCausalLM")
    model.save_pretrained(repository / "snapshots" / revision, max_shard_size=shard_size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    report = analyze("someone/tiny", progress=False)
    assert report.rows == analyze(model, progress=False).rows
    assert report.model == "someone/tiny"


CUSTOM_CODE = """
import torch
from transformers import PreTrainedModel, PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-its-own"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.steps = [x.item() for x in torch.linspace(0, 1, 3)]
        self.only = torch.nn.Linear(3, 2)
        self.post_init()
"""


def test_a_checkpoints_own_code_runs_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    (tmp_path / "tiny.py").write_text(CUSTOM_CODE)
    config = {
        "model_type": "tiny-of-its-own",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.TinyModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = torch.randn(2, 3)
    save_file({"only.weight": weight, "only.bias": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        analyze(tmp_path)
    units, _ = split(iter_checkpoint_units(tmp_path, trust_remote_code=True))
    assert torch.equal(units["only.weight"].load().tensor, weight)


def on_meta(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_a_live_model_on_meta_is_read_from_the_folder_it_names(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    model.save_pretrained(tmp_path)
    assert analyze(on_meta(tmp_path), progress=False).rows == analyze(model, progress=False).rows
    halved = analyze(on_meta(tmp_path, torch.bfloat16), progress=False)
    assert halved.rows == analyze(model.bfloat16(), progress=False).rows  # the live model's dtype, not the file's


def test_a_wrapped_model_on_meta_too(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    wrapped = get_peft_model(on_meta(tmp_path), LoraConfig(target_modules=["q_proj"]))
    assert analyze(wrapped, progress=False).rows == analyze(model, progress=False).rows
    assert analyze(torch.compile(on_meta(tmp_path)), progress=False).rows == analyze(model, progress=False).rows


def test_a_rank_that_holds_only_meta_tensors_selects_the_same(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    here = get_peft_model(model, CondFTConfig(num_tensors=3))
    there = get_peft_model(on_meta(tmp_path), CondFTConfig(num_tensors=3))
    assert there.peft_config["default"].target_units == here.peft_config["default"].target_units
    assert all(parameter.is_meta for parameter in there.parameters())


def test_only_the_meta_part_is_read(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    half = on_meta(tmp_path)
    changed = torch.randn(16, 16)
    half.model.layers[0].self_attn.q_proj.weight = nn.Parameter(changed)
    units, _ = split(iter_units(half))
    assert units["model.layers.0.self_attn.q_proj.weight"].deferred is None
    assert torch.equal(units["model.layers.0.self_attn.q_proj.weight"].tensor, changed)
    other = units["model.layers.1.self_attn.q_proj.weight"].load().tensor
    assert torch.equal(other, model.model.layers[1].self_attn.q_proj.weight)


def test_meta_weights_without_a_checkpoint_say_so(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    _, skipped = split(iter_units(on_meta(tmp_path, vocab_size=40)))
    details = {skip.name: skip.detail for skip in skipped if skip.reason is SkipReason.META_DEVICE}
    assert details.keys() == {"model.embed_tokens.weight"}
    assert "holds it as (32, 16), the model needs (40, 16)" in details["model.embed_tokens.weight"]
    (tmp_path / SINGLE_FILE).unlink()
    _, skipped = split(iter_units(on_meta(tmp_path)))
    details = {skip.name: skip.detail for skip in skipped if skip.reason is SkipReason.META_DEVICE}
    assert "has neither model.safetensors" in details["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"nothing to analyze in LlamaForCausalLM: .* meta_device"):
        analyze(on_meta(tmp_path))


def peak_memory() -> int:
    """Highest resident memory since it was last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def save_zeros(shapes: dict[str, torch.Size], file: Path) -> None:
    """A safetensors file of fp32 zeros that takes no space on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * shape.numel()]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak")
def test_two_weights_in_memory_at_a_time(tmp_path: Path) -> None:
    size = 48 * 2**20  # malloc gives back at once only what is larger than 32 MiB
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": 4, "intermediate_size": size // 64})
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    save_zeros({name: value.shape for name, value in model.state_dict().items()}, tmp_path / SINGLE_FILE)
    units, _ = split(iter_checkpoint_units(tmp_path))
    assert sum(unit.tensor.nbytes == size for unit in units.values()) == 12
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    for unit in load_ahead(units.values()):
        assert unit.tensor.sum() == 0
    assert peak_memory() - before < 2.5 * size


def test_a_config_that_was_cut_off_is_named(tmp_path):
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match=r"/config\.json cannot be read: .*not a valid JSON"):
        open_checkpoint(tmp_path)
