"""The error of κ against NumPy's SVD in double precision: over planted spectra, and over a real model's layers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from condft.analysis.analyze import analyze
from condft.spectra import spectral_facts
from condft.spectra.routes import EPS64

__all__ = ["SHAPES", "error_grid", "error_over_model", "planted"]

SHAPES = ((192, 576), (576, 576), (1024, 1024), (1536, 576), (600, 560), (8192, 128))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def error_grid(shapes: Sequence[tuple[int, int]] = SHAPES) -> list[dict[str, Any]]:
    """A row for each shape, planted κ (1 to 1e12) and dtype: see `planted_error`."""
    decades = range(0, 13, 2)
    return [planted_error(shape, 10.0**decade, dtype) for shape in shapes for decade in decades for dtype in DTYPES]


def planted_error(shape: tuple[int, int], kappa: float, dtype: torch.dtype) -> dict[str, Any]:
    """The largest relative error of κ over two spectra (geometric and linear), as stored in a dtype.

    Returns:
        `error` is null if both matrices are numerically rank-deficient or have a lower bound only. `bounds_below` says
        how far the lower bounds are under the truth; a bound above it would be negative.
    """
    errors: list[float] = []
    below: list[float] = []
    methods = set()
    n = min(shape)
    for seed, spectrum in enumerate((np.geomspace(kappa, 1.0, n), np.linspace(kappa, 1.0, n))):
        matrix = planted(shape, spectrum, seed).to(dtype)
        values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        facts = spectral_facts(matrix)
        methods.add(facts.method)
        if math.isfinite(facts.condition_number):
            off = float(facts.condition_number * values[-1] / values[0] - 1)
            if facts.is_lower_bound:
                below.append(-off)
            else:
                errors.append(abs(off))
    return {
        "shape": shape,
        "planted_kappa": kappa,
        "dtype": str(dtype).removeprefix("torch."),
        "error": max(errors, default=None),
        "methods": sorted(methods),
        "bounds_below": below,
    }


def planted(shape: tuple[int, int], spectrum: np.ndarray, seed: int) -> torch.Tensor:
    """An fp64 matrix of these singular values, with random singular vectors."""
    rng = np.random.default_rng(seed)
    n = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], n)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], n)))[0]
    return torch.from_numpy(left * spectrum @ right.T)


def error_over_model(model: nn.Module) -> dict[str, Any]:
    """The largest error of κ, how many places of the order differ, and how often a row promises too much accuracy.

    The reference has a rounding error of its own, which is granted: max(m, n) eps κ (Golub & Van Loan, §8.6). For a
    small κ that is more than the error that a row promises.
    """
    rows = analyze(model, progress=False, cache=False).rows
    parameters = dict(model.named_parameters())
    reference: dict[str, float] = {}
    granted: dict[str, float] = {}
    for row in rows:
        values = np.linalg.svd(parameters[row.name].detach().double().flatten(1).numpy(), compute_uv=False)
        reference[row.name] = float(values[0] / values[-1])
        granted[row.name] = max(row.matrix_shape) * EPS64 * reference[row.name]
    ours = {row.name: row.condition_number for row in rows}
    off = {name: abs(ours[name] / reference[name] - 1) for name in ours}
    order, true_order = (sorted(kappas, key=kappas.__getitem__) for kappas in (ours, reference))
    worst = max(off, key=off.__getitem__)
    return {
        "weights": len(rows),
        "largest_error": off[worst],
        "worst": worst,
        "places_of_the_order_that_differ": sum(a != b for a, b in zip(order, true_order, strict=True)),
        "past_their_relative_error": sum(off[row.name] > row.relative_error + granted[row.name] for row in rows),
        "lower_bounds": sum(row.relative_error > 1e-2 for row in rows),
        "largest_kappa": max(reference.values()),
        "methods": sorted({row.method for row in rows}),
    }
