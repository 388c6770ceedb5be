"""What `condft compare` prints and writes."""

import json

from tests.helpers.cli import invoke


def test_compare(report_file, tiny_llama, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    output = invoke(
        "compare", report_file, tmp_path / "other", "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png"
    )
    assert "median change" in output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["overall"]["num_changed"] == found["overall"]["num_units"] == 29
    assert -1 < found["overall"]["spearman"] < 1
    assert (tmp_path / "c.png").stat().st_size > 0
