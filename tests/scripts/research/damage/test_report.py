"""Tables and figure from planted lines."""

import json
from pathlib import Path

from scripts.research.damage.report import write_report
from tests.helpers.records.damage_lines import experiment_lines


def test_a_score_that_orders_the_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in experiment_lines(layers=8)))
    tables, figure = write_report(path)
    text = tables.read_text(encoding="utf-8")
    assert "16 tensors of 2 types, seed\n0" in text
    within = text.split("## Spearman correlation within types")[1].split("##")[0]
    row = next(line for line in within.splitlines() if line.startswith("| κ |"))
    assert row.split("|")[5].strip() == "1.00 [1.00, 1.00]"  # KL at equal gain rises with κ
    assert "| v_proj | 8 | 12 |" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
