"""The index of a checkpoint folder: the files that were written before are read, and damage is said where it is."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from condft import analyze
from condft.analysis.cache import open_cache
from condft.analysis.index import FolderFingerprint, WeightIndex, index_from_json, index_to_json
from condft.analysis.measure import UnitInfo
from condft.report import Role, SkippedWeight, SkipReason
from tests.helpers.models.tiny_checkpoints import build

INDEX = WeightIndex(
    units=(
        UnitInfo("e[0]", (6, 4), (6, 4), "bfloat16", "m.*.e", Role.EXPERT, None, collective=False),
        UnitInfo("c.weight", (4, 2, 3), (4, 6), "float32", "c", Role.LAYER, 0.0625, collective=True),
    ),
    skipped=(SkippedWeight("head", (8, 4), SkipReason.TIED, "shares its memory with c.weight"),),
    digests={"e[0]": "0f" * 16},
)
# As condft 0.1.0 wrote it before it used pydantic (commit f5a3e70), key by key.
BEFORE: dict[str, Any] = {
    "folder": "/models/tiny",
    "files": {"transformers": "5.23.0", "algorithm": 4, "model.safetensors": ["/models/tiny/model.safetensors", 9, 8]},
    "units": [
        {
            "name": "e[0]",
            "shape": [6, 4],
            "matrix_shape": [6, 4],
            "dtype": "bfloat16",
            "module_type": "m.*.e",
            "role": "expert",
            "rounding_error": None,
            "collective": False,
        },
        {
            "name": "c.weight",
            "shape": [4, 2, 3],
            "matrix_shape": [4, 6],
            "dtype": "float32",
            "module_type": "c",
            "role": "layer",
            "rounding_error": 0.0625,
            "collective": True,
        },
    ],
    "skipped": [{"name": "head", "shape": [8, 4], "reason": "tied", "detail": "shares its memory with c.weight"}],
    "digests": {"e[0]": "0f" * 16},
}
FINGERPRINT = FolderFingerprint(Path("/models/tiny"), "tensor", BEFORE["files"], taken_ns=0)


def test_the_file_is_as_before_and_read_as_before():
    assert index_to_json(INDEX, FINGERPRINT) == BEFORE
    assert index_from_json(json.dumps(BEFORE, indent=2).encode(), FINGERPRINT) == INDEX


def test_an_index_of_other_files_is_not_used():
    changed = {**BEFORE, "files": {**BEFORE["files"], "transformers": "6.0.0"}}
    assert index_from_json(json.dumps(changed).encode(), FINGERPRINT) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: value["units"][1].pop("shape"), r"damaged at units\.1\.shape: Field required"),
        (lambda value: value["units"][0].update(role="leader"), r"damaged at units\.0\.role: Input should be"),
        (lambda value: value["units"][0].update(matrix_shape=[6]), r"damaged at units\.0\.matrix_shape\.1"),
        (lambda value: value.pop("digests"), "damaged at digests: Field required"),
    ],
)
def test_a_damaged_file_says_where(damage: Any, message: str):
    value = json.loads(json.dumps(BEFORE))
    damage(value)
    with pytest.raises(ValueError, match=message):
        index_from_json(json.dumps(value).encode(), FINGERPRINT)
    with pytest.raises(ValueError, match="it is damaged: Invalid JSON"):
        index_from_json(json.dumps(BEFORE).encode()[:-20], FINGERPRINT)


def test_a_fingerprint_holds_while_no_file_changes(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "notes.txt").write_text("of no account")
    young = FolderFingerprint.of(tmp_path, "tensor", trust_remote_code=False)
    assert not young.still_holds()  # a second change within this tick of the clock would not show
    os.utime(file, (time.time() - 60, time.time() - 60))
    taken = FolderFingerprint.of(tmp_path, "tensor", trust_remote_code=False)
    assert taken.still_holds()
    assert "notes.txt" not in taken.files
    (tmp_path / "config.json").write_text("{}")
    assert not taken.still_holds()


def test_digests_are_added_to_those_that_are_known(tmp_path: Path):
    folder = tmp_path / "model"
    build("LlamaForCausalLM", torch.float32).save_pretrained(folder)
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60, time.time() - 60))
    cache = open_cache(tmp_path / "cache")
    assert cache is not None
    names = [row.name for row in analyze(folder, cache=False, progress=False).rows]
    for count in (1, 2):
        analyze(folder, names=names[count - 1 : count], cache=tmp_path / "cache", progress=False)
        index = cache.read_index(FolderFingerprint.of(folder, "tensor", trust_remote_code=False))
        assert index is not None
        assert sorted(index.digests) == sorted(names[:count])
