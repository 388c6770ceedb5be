"""The error of κ over the layer weights of a real model, against NumPy's SVD in double precision."""

from typing import Any

import numpy as np
from torch import nn

from condft.analysis.analyze import analyze
from condft.spectra.routes import EPS64

__all__ = ["error_over_model"]


def error_over_model(model: nn.Module) -> dict[str, Any]:
    """How far κ is off at most, how many places of the order differ, and how often a row vouches for too much.

    The reference's own rounding is granted: max(m, n) eps κ (Golub & Van Loan, §8.6), as of small κ a row vouches for
    less than that.
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
