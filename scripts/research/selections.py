"""Selections that condft does not offer: the study's controls and a competing rule. Names in, names out."""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import quantiles
from typing import Any

from condft import SpectralReport, SpectralRow, select_units

_IQR_OF_NORMAL = 1.349  # interquartile range of a standard normal distribution, in standard deviations


def choose(
    report: SpectralReport, fraction: float, *, kinds: Collection[str] | None = None, **rule: Any
) -> tuple[str, ...]:
    """`select_units` within a budget that is a fraction of *all* the report's weights, also if few kinds may be taken.

    Args:
        report: Of the candidate weights alone.
        fraction: Of their parameters.
        kinds: Only modules of these names (`q_proj`, ...); None for all.
        rule: Of `select_units`: score, order, stratify, seed.

    Raises:
        ValueError: The kinds hold fewer parameters than the budget.
    """
    rows = [row for row in report.rows if kinds is None or kind_of(row.name) in kinds]
    share = fraction * _parameters(report.rows) / max(1, _parameters(rows))
    if share > 1:
        raise ValueError(f"{sorted(kinds or ())} hold {_parameters(rows):,} parameters, less than the budget")
    names = [row.name for row in rows]
    # rounded up: else rounding would cost the last unit of a share that is a whole number of units
    share = min(1.0, math.ceil(share * 1e12) / 1e12)
    return select_units(report, trainable_fraction=share, candidates=names, **rule).names


def kind_of(name: str) -> str:
    """`q_proj` of `layers.3.self_attn.q_proj.weight`, `down_proj` of `layers.3.mlp.experts.down_proj[5]`."""
    parameter, bracket, _ = name.partition("[")
    return parameter.split(".")[-1 if bracket else -2]


def layer_of(name: str) -> int:
    """3 of `model.layers.3.self_attn.q_proj.weight`; 0 where no layer is numbered."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else 0


def same_shapes_and_depths(report: SpectralReport, reference: Collection[str], *, seed: int) -> tuple[str, ...]:
    """For each unit of a selection one drawn at random of its shape and its third of the depth, none twice.

    The draw has the shapes and depths of the reference, and its roles and condition numbers only by chance.
    """
    depth = 1 + max(layer_of(row.name) for row in report.rows)
    groups: dict[tuple[tuple[int, ...], int], list[str]] = defaultdict(list)
    wanted: dict[tuple[tuple[int, ...], int], int] = defaultdict(int)
    for row in report.rows:
        group = (row.shape, 3 * layer_of(row.name) // depth)
        groups[group].append(row.name)
        wanted[group] += row.name in reference
    chosen = [name for group, names in groups.items() for name in _shuffled(names, seed)[: wanted[group]]]
    return tuple(sorted(chosen))


def highest_signal_to_noise(report: SpectralReport, fraction: float) -> tuple[str, ...]:
    """Spectrum's rule (Hartford et al. 2024, arXiv 2406.06623): the highest signal-to-noise ratios of each type.

    Args:
        report: With spectra (`analyze(..., spectrum=True)`).
        fraction: Budget, dealt to module types in proportion to their parameters, as `select_units` does.

    Raises:
        ValueError: The report has no spectra.
    """
    # Noise to signal replaces κ: `select_units` then spends this budget exactly as that of every other arm.
    ratios = ((row, signal_to_noise(row)) for row in report.rows)
    rows = tuple(replace(row, condition_number=1 / ratio if ratio > 0 else math.inf) for row, ratio in ratios)
    return choose(replace(report, rows=rows), fraction)


def signal_to_noise(row: SpectralRow) -> float:
    r"""Sum of the singular values above the Marchenko-Pastur edge over the sum of those below, over the largest.

    The edge is $s\,(1+\sqrt\beta)$ with $\beta \le 1$ the ratio of the sides and $s$ the interquartile range of the
    singular values over 1.349, as Spectrum's authors estimate the noise.

    Raises:
        ValueError: The row has no spectrum.
    """
    if row.spectrum is None:
        raise ValueError(f"{row.name} has no spectrum: analyze with spectrum=True")
    low, _, high = quantiles(row.spectrum, n=4, method="inclusive")
    beta = min(row.matrix_shape) / max(row.matrix_shape)
    edge = (high - low) / _IQR_OF_NORMAL * (1 + math.sqrt(beta))
    signal = math.fsum(value for value in row.spectrum if value > edge)
    noise = math.fsum(value for value in row.spectrum if value <= edge)
    return signal / noise / row.sigma_max if noise > 0 else math.inf


def _parameters(rows: Sequence[SpectralRow]) -> int:
    return sum(row.num_parameters for row in rows)


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    # a hash, as select_units draws: neither module order nor numpy's version matters
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
