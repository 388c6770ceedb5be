"""Pictures of a planted atlas, and their labels."""

import json
from pathlib import Path

import pytest

from scripts.research.kappa.columns import load_atlases, load_changes
from scripts.research.kappa.figures import draw_deficits, draw_depths, draw_stability, short_type, within_types
from tests.helpers.records.atlas_lines import atlas_lines, change_lines


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.*.self_attn.q_proj", "self_attn.q_proj"),
        ("model.decoder.layers.*.self_attn.q_proj", "decoder self_attn.q_proj"),
        ("pooler.dense", "pooler.dense"),
    ],
)
def test_types_have_short_names(name: str, label: str) -> None:
    assert short_type(name) == label


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    for name, lines in (("atlas", atlas_lines()), ("stability", change_lines())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (atlas,) = load_atlases(tmp_path / "atlas.jsonl")
    changes = load_changes(tmp_path / "stability.jsonl", atlas)
    assert [within_types(change, "κ", True) for change in changes] == pytest.approx([1.0, -1.0])
    draw_deficits([atlas], tmp_path / "deficit.png")
    draw_depths(atlas, tmp_path / "depth.png")
    draw_stability({"tiny": changes}, tmp_path / "changes.png")
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == 3
