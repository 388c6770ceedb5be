"""Tables and figures of the atlas and the stability of κ, from the committed JSONL alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from condft.files.atomic import write_text
from scripts.research.kappa.columns import Atlas, Change, Labels, load_atlases, load_changes
from scripts.research.kappa.figures import SHOWN, draw_deficits, draw_depths, draw_stability, short_type, within_types
from scripts.research.kappa.squares import kept_of_lowest, random_square_spread, square_quantiles
from scripts.research.statistics import (
    Floats,
    bootstrap_draws,
    explained_by_chance,
    explained_by_groups,
    percentile_interval,
    rank_correlation,
    spread_within,
)
from scripts.research.tables import spread, table, with_interval


def write_report(folder: Path) -> list[Path]:
    """Writes kappa.md and its figures next to atlas.jsonl and stability.jsonl; returns their paths."""
    atlases = load_atlases(folder / "atlas.jsonl")
    changes = {atlas.model: load_changes(folder / "stability.jsonl", atlas) for atlas in atlases}
    changes = {model: found for model, found in changes.items() if found}
    paths = [folder / "kappa.md", folder / "deficit.png"]
    draw_deficits(atlases, paths[1])
    for atlas in atlases:
        paths.append(folder / f"atlas_{atlas.model}.png")
        draw_depths(atlas, paths[-1])
    if changes:
        paths.append(folder / "stability.png")
        draw_stability(changes, paths[-1])
    sections = [
        _heading(atlases),
        _deficits(atlases),
        _variance(atlases),
        _random(atlases),
        *map(_types, atlases),
        _others(atlases),
        *(_stability(model, found) for model, found in changes.items()),
    ]
    write_text(paths[0], "\n\n".join(sections) + "\n")
    return paths


def _heading(atlases: Sequence[Atlas]) -> str:
    commits = sorted({line["commit"][:12] for atlas in atlases for line in atlas.lines})
    return f"""# What κ is on real weights

Made by `python -m scripts.research.kappa report`; atlas measured at {", ".join(commits)}. Layer weights (embeddings
and position tables have a table of their own), weighted equally. Deficit: entropy deficit, nats a dimension. Random: a
Gaussian matrix of the same shape. Intervals: 95 %, bootstrap over weights within types."""


def _deficits(atlases: Sequence[Atlas]) -> str:
    rows = []
    for atlas in atlases:
        deficit, low, high = map(atlas.column, ("entropy_deficit", "deficit_at_least", "deficit_at_most"))
        inside = int(((low <= deficit) & (deficit <= high)).sum())
        cells = [f"{inside} of {len(deficit)}", spread(deficit / high), spread(deficit / low)]
        rows.append([atlas.model, *cells])
    table = _lines(["model", "between both bounds", "deficit / highest possible", "deficit / lowest possible"], rows)
    correlations = []
    for atlas in atlases:
        deficit = atlas.column("entropy_deficit")
        random = rank_correlation(atlas.column("random_entropy_deficit"), deficit)
        cells = [_correlation(atlas, deficit, groups) for groups in (None, atlas.shapes, atlas.types)]
        correlations.append([atlas.model, *cells, f"{float(random):.2f}"])
    head = ["model", "over all", "within shapes", "within types", "the random matrix's deficit, over all"]
    return f"""## κ against entropy deficit

The bounds are what κ alone allows (`scripts.research.information`). Ratios: median (lowest to highest).

{table}

Spearman correlation of the deficit with κ; in the last column with the deficit that shape alone gives.

{_lines(head, correlations)}"""


def _variance(atlases: Sequence[Atlas]) -> str:
    rows = []
    for atlas in atlases:
        relative = atlas.column("relative_condition_number")
        depth = atlas.column("depth")
        left = float(relative.var() / atlas.log_kappa.var())
        for label, values in (("log κ", atlas.log_kappa), ("relative κ", relative)):
            cells = [_explained(values, groups) for groups in (atlas.types, atlas.shapes, depth)]
            within = _explained(_centered(values, atlas.types), depth)
            rows.append([atlas.model, label, *cells, within, f"{1 - left:.2f}" if label == "log κ" else ""])
    head = ["model", "", "type", "shape", "layer", "layer, within types", "the random matrix's log κ, as it is"]
    return f"""## What explains κ

Share of the variance (η²) between groups, in brackets what random groups of those sizes give on average. Relative κ is
log κ less the logarithm of the random matrix's. The last column: 1 - variance of relative κ over that of log κ.

{_lines(head, rows)}"""


def _random(atlases: Sequence[Atlas]) -> str:
    rows = []
    for atlas in atlases:
        relative = atlas.column("relative_condition_number")
        excess = atlas.column("entropy_deficit") - atlas.column("random_entropy_deficit")
        for label, where in (("square", atlas.square), ("rectangular", ~atlas.square)):
            if not where.any():
                continue
            above = [f"{np.mean(column[where] > 0):.0%}" for column in (relative, excess)]
            cells = [str(int(where.sum())), above[0], spread(relative[where]), above[1]]
            rows.append(
                [atlas.model, label, *cells, *(_as_random_squares(atlas) if label == "square" else ["", "", ""])]
            )
    head = ["model", "weights", "", "κ above random", "relative κ", "deficit above random"]
    head += ["in random squares' middle 95 %", "median quantile among them", "spread of log κ within types"]
    return f"""## Against random matrices

Relative κ: nats above the random median, median (lowest to highest). The law of random squares is Edelman's, where
log κ has a standard deviation of {random_square_spread():.2f}; a random rectangle's κ hardly varies.

{_lines(head, rows)}"""


def _as_random_squares(atlas: Atlas) -> list[str]:
    """Where the κ of square weights are in the distribution of random squares."""
    log_kappa, types = atlas.log_kappa[atlas.square], atlas.types[atlas.square]
    sizes = np.array([line["shape"][0] for line in atlas.lines])[atlas.square]
    quantiles = square_quantiles(np.exp(log_kappa), sizes)
    inside = np.mean((quantiles > 0.025) & (quantiles < 0.975))
    return [f"{inside:.0%}", f"{np.median(quantiles):.2f}", f"{spread_within(log_kappa, types):.2f}"]


def _types(atlas: Atlas) -> str:
    rows = []
    for name in atlas.type_names:
        inside = np.flatnonzero(atlas.types == name)
        kappa, deficit = atlas.column("condition_number")[inside], atlas.column("entropy_deficit")[inside]
        first = atlas.lines[inside[0]]
        depth = atlas.column("depth")[inside]
        rows.append(
            [
                short_type(name),
                str(len(inside)),
                " x ".join(map(str, first["shape"])),
                spread(kappa, "{:.3g}"),
                f"{first['random_condition_number']:.3g}",
                f"{np.median(deficit):.2f} / {first['random_entropy_deficit']:.2f}",
                f"{float(rank_correlation(depth, kappa)):.2f}" if len(inside) > 5 else "",
                f"{float(rank_correlation(kappa, deficit)):.2f}" if len(inside) > 5 else "",
            ]
        )
    head = ["type", "weights", "shape", "κ", "random", "deficit / random", "κ with depth", "κ with deficit"]
    return f"""## {atlas.model}, type by type

κ: median (lowest to highest). The last two columns are Spearman correlations, of types of six weights and more.

{_lines(head, rows)}"""


def _others(atlases: Sequence[Atlas]) -> str:
    rows = [
        [
            atlas.model,
            line["name"],
            " x ".join(map(str, line["shape"])),
            f"{line['condition_number']:.3g} / {line['random_condition_number']:.3g}",
            f"{line['entropy_deficit']:.2f} / {line['random_entropy_deficit']:.2f}",
        ]
        for atlas in atlases
        for line in atlas.others
    ]
    return "## Weights that are no layers\n\n" + _lines(
        ["model", "weight", "shape", "κ / random", "deficit / random"], rows
    )


def _stability(model: str, changes: Sequence[Change]) -> str:
    rows = []
    for change in changes:
        cells = [f"{within_types(change, score, square):.2f}" for _, score, square in SHOWN]
        kept = [_kept(change, score) for score in ("κ", "entropy deficit", "stable rank")]
        moved = f"{np.median(change.moved):.2g}"
        rows.append([change.label, moved, *cells, *kept, str(change.line["unresolved"])])
    head = ["change", "‖ΔW‖/‖W‖", *(label for label, _, _ in SHOWN)]
    head += ["lowest tenth kept: κ", "deficit", "stable rank", "σ_min under the format's rounding"]
    notes = [
        f"Fine-tuning at {change.line['amount']:g}: {change.line['steps']} steps, test loss "
        f"{change.line['test_loss_before']:.3f} to {change.line['test_loss']:.3f} nats a token."
        for change in changes
        if "steps" in change.line
    ]
    total = (
        f"The columns after ‖ΔW‖/‖W‖ (median) are Spearman correlations within types; {len(changes[0].types)} weights."
    )
    notes.append(f"Measured at {', '.join(sorted({change.line['commit'][:12] for change in changes}))}.")
    return f"## Stability: {model}\n\n{' '.join([total, *notes])}\n\n{_lines(head, rows)}"


def _kept(change: Change, score: str) -> str:
    before, after = change.scores[score]
    kept, count = kept_of_lowest(before, after, change.types)
    return f"{kept} of {count}"


def _correlation(atlas: Atlas, deficit: Floats, groups: Labels | None) -> str:
    draws = bootstrap_draws(atlas.types)

    def at(index: NDArray[np.int64]) -> Floats:
        return rank_correlation(atlas.log_kappa[index], deficit[index], groups)

    return with_interval(float(at(np.arange(len(deficit)))), *percentile_interval(at(draws)))


def _explained(values: Floats, groups: Labels | Floats) -> str:
    return f"{explained_by_groups(values, groups):.2f} ({explained_by_chance(groups):.2f})"


def _centered(values: Floats, groups: Labels) -> Floats:
    """Less the mean of each group."""
    result = values.copy()
    for label in np.unique(groups):
        result[groups == label] -= values[groups == label].mean()
    return result


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(head, rows))
