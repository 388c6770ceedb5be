"""Lists of parameters for other programs."""

import json
import re

import yaml

from condft import analyze
from tests.helpers.cli import invoke, refused


def test_unfrozen_parameters_name_the_chosen_parameters_only(report_file, tmp_path, tiny_llama):
    invoke("select", report_file, "--num-tensors", 7, "--yaml", tmp_path / "u.yaml", "--out", tmp_path / "n.json")
    patterns = yaml.safe_load((tmp_path / "u.yaml").read_text())["unfrozen_parameters"]
    chosen = json.loads((tmp_path / "n.json").read_text())["target_units"]
    names = [name for name, _ in tiny_llama().named_parameters()]
    for read in (lambda p: p, lambda p: p.replace(".", "\\.")):  # Spectrum's readers, and axolotl's LayerNamePattern
        matched = [name for name in names if any(re.match(read(pattern), name) for pattern in patterns)]
        assert sorted(matched) == chosen


def test_parts_of_parameters_cannot_be_unfrozen_parameters(tiny_llama, tmp_path):
    analyze(tiny_llama(), granularity="head", progress=False).save(tmp_path / "h.json")
    output = refused(
        "select", tmp_path / "h.json", "--stratify", "none", "--num-tensors", 30, "--yaml", tmp_path / "u.yaml"
    )
    assert "parts of a parameter" in output
    assert "CondFTConfig(target_units=...)" in output
    assert not (tmp_path / "u.yaml").exists()
