"""Pictures of curves that nobody measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.research.study.figures import draw_across, draw_curves, draw_fronts, draw_ratios
from scripts.research.study.levels import Ratio


def run(shift: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "test_loss": 4.0 - 0.1 * step, "text_ce_change": shift * step, "kl_to_base": shift * step}
        | {"wer_en": 1.0 - 0.01 * step}
        for step in (0, 10, 20)
    ]


ARMS = [(f"arm {index}", [run(0.01 * (index + 1)), run(0.02 * (index + 1))]) for index in range(12)]


@pytest.mark.parametrize("draw", [draw_fronts, draw_curves])
def test_more_arms_than_colors_are_drawn(draw: Callable[..., None], tmp_path: Path) -> None:
    draw(ARMS, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_without_an_upper_end_are_drawn(tmp_path: Path) -> None:
    ratios = {"ours": {"theirs": ([0.5, -1.0], Ratio(0.4, 0.2, np.inf, 2, -1.0))}}
    draw_ratios(ratios, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_levels_without_a_ratio_are_gaps(tmp_path: Path) -> None:
    panels = {"ours": {"theirs": np.array([0.5, np.nan, 0.7])}}
    draw_across([3.0, 2.5, 2.0], panels, tmp_path / "a.png", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
