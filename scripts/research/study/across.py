"""Ratios of forgetting between arms at all levels from a study's first to its last one, not at these alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.research.config import DISTILLED, StudyConfig
from scripts.research.study.figures import draw_across
from scripts.research.study.levels import Across, level_ratios, lowest_at_level, ratio_across
from scripts.research.study.results import Results
from scripts.research.tables import rows_of_cells, table, with_interval

NUM_LEVELS = 21


def levels_between(config: StudyConfig) -> list[float]:
    """Test losses from the study's lightest to its strongest level, evenly spaced; none if it has one level."""
    lightest, strongest = max(config.levels), min(config.levels)
    return np.linspace(lightest, strongest, NUM_LEVELS).tolist() if strongest < lightest else []


def forgotten(config: StudyConfig, results: Results, measure: str) -> dict[str, list[list[float]]]:
    """Every arm that has a finished run -> (levels, seeds): the measure at the rate that forgets least there."""
    curves: dict[str, dict[int, list[list[tuple[float, float]]]]] = {}
    for spec, key in results.by_spec().items():
        if curve := results.curve(key, measure):
            curves.setdefault(spec.arm, {}).setdefault(spec.seed, []).append(curve)
    return {
        arm: [
            [lowest_at_level(curves[arm].get(seed, []), level) for seed in config.seeds]
            for level in levels_between(config)
        ]
        for arm in config.arms
        if arm in curves
    }


def across_tables(
    config: StudyConfig, results: Results, references: Sequence[str], measures: dict[str, str]
) -> list[str]:
    """Tables of the references over every arm, and of arms with self-distillation over the same arms without.

    Args:
        config: The study.
        results: Its runs.
        references: Arms that others are compared with; those without a run are left out.
        measures: Of forgetting -> its label.

    Returns:
        Lines; none for a study with a single level.
    """
    levels = levels_between(config)
    if not levels:
        return []
    lines = [
        "",
        f"## Across {len(levels)} levels, from test loss {levels[0]:g} to {levels[-1]:g}",
        "",
        "At each level and on each seed every arm is read at the best of its rates that were run on that seed. A cell "
        "is the geometric mean over the levels of the ratio of means over the seeds that both arms have there, [95 % "
        "by a bootstrap over seeds; of two or three it is about their range], (the least and the most at any level), "
        "levels with a ratio, and pairs of seeds. Below 1: forgets less than the control.",
    ]
    for measure, label in measures.items():
        arms = forgotten(config, results, measure)
        shown = [name for name in references if name in arms]
        rows = {
            control: [None if name == control else ratio_across(arms[name], arms[control]) for name in shown]
            for control in arms
        }
        lines += ["", f"### {label}", "", *_table("control", shown, rows)]
        if shown and len(config.seeds) > 1:
            lines += _by_seed(shown[0], arms, config.seeds)
        pairs: dict[str, list[Across | None]] = {
            name: [ratio_across(arms[name + DISTILLED], arms[name])] for name in arms if name + DISTILLED in arms
        }
        if pairs:
            lines += ["", *_table("arm", ["with self-distillation over without"], pairs)]
    return lines


def draw_levels(config: StudyConfig, results: Results, references: Sequence[str], path: Path, *, title: str) -> bool:
    """Draws the ratios of `best_by` over the levels; returns whether there was anything to draw.

    Args:
        config: The study.
        results: Its runs.
        references: As in `across_tables`: a panel each.
        path: Image file.
        title: Above the figure.
    """
    arms, levels = forgotten(config, results, config.best_by), levels_between(config)
    panels = {
        ours: {
            theirs: ratios
            for theirs in arms
            if theirs != ours and (theirs in references or config.arms[theirs].main)
            if not np.isnan(ratios := level_ratios(np.asarray(arms[ours]), np.asarray(arms[theirs]))).all()
        }
        for ours in references
        if levels and ours in arms
    }
    panels = {ours: ratios for ours, ratios in panels.items() if ratios}
    if panels:
        draw_across(levels, panels, path, title=title)
    return bool(panels)


def _by_seed(ours: str, arms: dict[str, list[list[float]]], seeds: Sequence[int]) -> list[str]:
    """One arm over the others, seed by seed, at the levels that both reach on the seed; empty if there are none."""
    column = {name: np.asarray(values) for name, values in arms.items()}
    rows = {
        control: [
            ratio_across(column[ours][:, [index]].tolist(), values[:, [index]].tolist()) for index in range(len(seeds))
        ]
        for control, values in column.items()
        if control != ours
    }
    body = rows_of_cells(
        {name: [f"{across.value:.2f}" if across.num_levels else "" for across in row] for name, row in rows.items()}
    )
    return ["", *table([f"{ours} over", *(f"seed {seed}" for seed in seeds)], body)] if body else []


def _table(corner: str, columns: Sequence[str], rows: dict[str, list[Across | None]]) -> list[str]:
    body = rows_of_cells({name: [_cell(across) for across in row] for name, row in rows.items()})
    if not body:
        return ["None: no two arms have a mean above 0 at the same level."]
    return table([corner, *columns], body)


def _cell(across: Across | None) -> str:
    if across is None or not across.num_levels:
        return ""
    ratio = with_interval(across.value, across.low, across.high)
    fewest, most = across.num_seeds
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{ratio} ({across.least:.2f} to {across.most:.2f}), {across.num_levels}, n = {seeds}"
