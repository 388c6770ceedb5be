"""A checkpoint that is streamed gives the loaded model's rows."""

from pathlib import Path

import pytest

from scripts.bench.analyzer import streaming
from tests.helpers.models.tiny_llama import build_tiny_llama


def test_streamed_and_loaded_rows_are_equal(tmp_path: Path) -> None:
    build_tiny_llama().save_pretrained(tmp_path / "model")
    figures = {
        kind: streaming.analyzed(tmp_path / "model", tmp_path / f"{kind}.json", loaded=kind == "loaded")
        for kind in ("streamed", "loaded")
    }
    rows = [streaming.rows_of(tmp_path / f"{kind}.json") for kind in figures]
    assert rows[0] == rows[1]
    assert all(found["peak_bytes"] > 0 and found["seconds"] > 0 for found in figures.values())


def test_the_written_checkpoint_is_found_by_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SIZES", {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2})
    monkeypatch.setattr(streaming, "LAYERS", 1)
    streaming.write(tmp_path)
    streaming.analyzed(tmp_path, tmp_path / "report.json", loaded=False)
    names = {row["name"] for row in streaming.rows_of(tmp_path / "report.json")}
    assert "model.layers.0.mlp.down_proj.weight" in names
