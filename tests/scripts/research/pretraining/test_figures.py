"""The pictures of a pre-training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.research.pretraining.figures import draw_kappa, draw_order
from tests.helpers.records.pretraining_points import planted_points


@pytest.mark.parametrize("draw", [draw_kappa, draw_order])
def test_a_picture_is_drawn_of_the_points(draw: Callable[..., None], tmp_path: Path) -> None:
    draw(planted_points(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
