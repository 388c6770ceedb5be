"""What `condft select` chooses, and the files of it."""

import json

from peft import get_peft_model

from condft import CondFTConfig, SpectralReport, analyze, select_units
from tests.helpers.cli import invoke, refused
from tests.helpers.models.tiny_checkpoints import build


def test_select_takes_no_more_than_keep_lowest_kept(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    invoke("analyze", tmp_path, "--keep-lowest", 5, "--json", tmp_path / "r.json")
    invoke("select", tmp_path / "r.json", "--stratify", "none", "--num-tensors", 2)
    beyond = ("select", tmp_path / "r.json", "--stratify", "none", "--num-tensors", 6)
    assert "only 4 candidates: analyze with keep_lowest of at least 7" in refused(*beyond)
    assert "only 5 candidates: analyze with keep_lowest of at least 6" in refused(
        *beyond, "--include-roles", "embedding"
    )


def test_a_selection_becomes_a_config(report_file, tmp_path, tiny_llama):
    output = invoke(
        "select", report_file, "--num-tensors", 7, "--out", tmp_path / "names.json", "--plot", tmp_path / "p.png"
    )
    assert "7 of 28 units" in output
    chosen = json.loads((tmp_path / "names.json").read_text())
    model = get_peft_model(tiny_llama(), CondFTConfig(target_units=chosen["target_units"]))
    assert sum(p.requires_grad for p in model.parameters()) == 7
    assert chosen["report_fingerprint"] == SpectralReport.load(report_file).fingerprint
    assert (tmp_path / "p.png").stat().st_size > 0


def test_experts_are_candidates_as_everywhere(tmp_path):
    report = analyze(build("MixtralForCausalLM"), progress=False)
    report.save(tmp_path / "r.json")
    invoke("select", tmp_path / "r.json", "--num-tensors", 6, "--out", tmp_path / "s.json")
    chosen = json.loads((tmp_path / "s.json").read_text())["target_units"]
    assert chosen == list(select_units(report, num_tensors=6).names)
    assert any("experts" in name for name in chosen)
