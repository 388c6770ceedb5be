"""How the analyzer's cost grows with the size and the number of weights, and what that means for large models."""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from condft.analysis.analyze import analyze
from condft.files.atomic import atomic_path

__all__ = ["extrapolate", "fitted", "plot_scaling", "scaling"]

SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
FITTED_FROM = 1536  # smaller weights run in parallel, each in one thread: a single one follows another law
ASPECTS = {"square": 1, "tall": 4}
COUNTS = (1, 2, 4, 8, 16)

# Shapes a layer, as transformers stores them, and how many layers. Norms, biases, embeddings and heads left out.
LARGE_MODELS: dict[str, tuple[int, Sequence[tuple[int, int, int]]]] = {
    "Llama 3 70B": (80, [(2, 8192, 8192), (2, 1024, 8192), (3, 28672, 8192)]),
    "Mixtral 8x7B": (32, [(2, 4096, 4096), (2, 1024, 4096), (8, 28672, 4096), (8, 4096, 14336)]),
}


def scaling(repeats: int) -> dict[str, Any]:
    """Seconds of `analyze` by size for squares and 4:1 rectangles, and by number of 512 x 512 weights; fitted.

    The fit is least squares on logarithms, of the sizes from `FITTED_FROM`: seconds = factor * n ** exponent.
    """
    found: dict[str, Any] = {"sizes": list(SIZES), "counts": list(COUNTS)}
    for name, aspect in ASPECTS.items():
        seconds = [_seconds([(aspect * n, n)], repeats) for n in SIZES]
        found[name] = {"seconds": seconds, **fitted(seconds)}
    seconds = [_seconds([(512, 512)] * count, repeats) for count in COUNTS]
    slope, offset = np.polyfit(COUNTS, seconds, 1)
    found["number"] = {"seconds": seconds, "per_weight": float(slope), "offset": float(offset)}
    return found


def extrapolate(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Hours for models too large for this machine, by flops from the largest size measured.

    Assumes: squares grow as n^3 (LU), rectangles as m n^2 with n the smaller side (the Gram matrix and its factors),
    weights in memory, conditioning as of random matrices (else a second route is tried), the measured machine.
    """
    n = SIZES[-1]
    square, tall = found["square"]["seconds"][-1], found["tall"]["seconds"][-1]
    rows = []
    for model, (layers, shapes) in LARGE_MODELS.items():
        seconds = 0.0
        for count, m, k in shapes:
            work = max(m, k) * min(m, k) ** 2 / n**3
            one = work * (square if m == k else tall / ASPECTS["tall"])
            seconds += layers * count * one
        rows.append({"model": model, "weights": layers * sum(s[0] for s in shapes), "hours": seconds / 3600})
    return rows


def plot_scaling(found: dict[str, Any], path: Path) -> None:
    """Cost by size with the fitted power laws, and by number of weights."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = np.array(found["sizes"], dtype=float)
    fitted = sizes[sizes >= FITTED_FROM]
    for index, name in enumerate(ASPECTS):
        fit = found[name]
        left.plot(sizes, fit["seconds"], "o", color=f"C{index}", label=f"{name}: n^{fit['exponent']:.2f}")
        left.plot(fitted, fit["factor"] * fitted ** fit["exponent"], "--", color=f"C{index}", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="n (tall: 4n x n)", ylabel="seconds a weight")
    left.legend(frameon=False)
    counts, fit = np.array(found["counts"]), found["number"]
    right.plot(counts, fit["seconds"], "o", color="C2")
    right.plot(counts, fit["offset"] + fit["per_weight"] * counts, "--", color="C2", linewidth=1)
    right.set(xlabel="number of 512 x 512 weights", ylabel="seconds")
    for axes in (left, right):
        axes.grid(True, alpha=0.25)
    figure.suptitle("Cost of condft.analyze (κ), measured and fitted", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def fitted(seconds: Sequence[float]) -> dict[str, float]:
    """The power law of seconds over `SIZES`, from `FITTED_FROM` on."""
    first = SIZES.index(FITTED_FROM)
    exponent, intercept = np.polyfit(np.log(SIZES[first:]), np.log(seconds[first:]), 1)
    return {"exponent": float(exponent), "factor": math.exp(intercept)}


def _seconds(shapes: Sequence[tuple[int, int]], repeats: int) -> float:
    layers = [nn.Linear(columns, rows, bias=False) for rows, columns in shapes]
    for index, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(index)
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * 0.02
    model = nn.ModuleList(layers)
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        analyze(model, progress=False, cache=False)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first call warms the libraries up
