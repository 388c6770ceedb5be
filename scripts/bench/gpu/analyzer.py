"""The analyzer on the device: every route and every batch against fp64 on the CPU, and κ of an 8B model's layer."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condft.spectra import SpectralFacts, batch_size, batched_facts, spectral_facts
from scripts.bench.analyzer.errors import planted
from scripts.bench.analyzer.races import LLAMA_8B_LAYER
from scripts.bench.gpu.part import Place, Result, timed

__all__ = ["batches", "kappa_of_8b", "routes"]

# One for each route: svd, eigen, cholesky of a square, gram and cholesky of a rectangle, qr, lu.
SHAPES = ((40, 12), (64, 576), (300, 300), (290, 700), (1536, 576), (600, 560), (1200, 1200))
SMALL_SHAPES = ((40, 12), (64, 72))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KAPPAS = (3.0, 1e3, 1e6)
BATCHES = {"heads": (64, 64, 4096), "experts": (64, 768, 2048)}
SMALL_BATCHES = {"heads": (3, 8, 24)}
LAYERS_OF_8B = 32


def routes(place: Place) -> Result:
    """κ of planted spectra on the device against NumPy's fp64 SVD: the largest error of each route.

    A row promises an error (`relative_error`); one that is further off than that, and than the tolerance of 1e-3, is
    a problem.
    """
    worst: dict[str, float] = {}
    problems = []
    for shape in SMALL_SHAPES if place.small else SHAPES:
        for dtype in DTYPES:
            for kappa in KAPPAS:
                # from 1 down: fp16 ends at 65,504
                matrix = planted(shape, np.geomspace(1.0, 1 / kappa, min(shape)), seed=0).to(dtype)
                truth = _condition_number(matrix)
                facts = spectral_facts(matrix.to(place.device), measures="all")
                error = abs(facts.condition_number / truth - 1)
                worst[facts.method] = max(worst.get(facts.method, 0.0), error)
                if not error <= max(facts.relative_error, 1e-3):
                    problems.append(f"{shape} {dtype} κ {kappa:g}: off by {error:.1e} by {facts.method}")
    return {"largest_error_by_route": worst, "problems": problems}


def batches(place: Place) -> Result:
    """Batched calls on the device: κ against fp64 on the CPU, and seconds per matrix against one call each."""
    found: Result = {"problems": []}
    for name, (count, *shape) in (SMALL_BATCHES if place.small else BATCHES).items():
        stack = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0)) * 0.02
        on_device = list(stack.to(place.device))
        size = batch_size(tuple(shape), stack.dtype)

        def in_batches(matrices: list[Tensor] = on_device, size: int = size) -> list[SpectralFacts | None]:
            starts = range(0, len(matrices), size)
            return [facts for start in starts for facts in batched_facts(matrices[start : start + size])]

        def one_by_one(matrices: list[Tensor] = on_device) -> list[SpectralFacts]:
            return [spectral_facts(matrix) for matrix in matrices]

        together, facts = timed(place, in_batches)
        alone, _ = timed(place, one_by_one)
        checked = range(0, count, max(1, count // 8))  # fp64 of all would take minutes
        errors = [_error(facts[index], stack[index]) for index in checked]
        found[name] = {
            "shape": shape,
            "matrices": count,
            "batch": size,
            "seconds_each": together / count,
            "seconds_each_alone": alone / count,
            "largest_error": max(errors),
        }
        if not max(errors) <= 1e-3:
            found["problems"].append(f"{name}: κ is off by {max(errors):.1e}")
    return found


def kappa_of_8b(place: Place) -> Result:
    """Seconds for κ of the weights of one Llama-8B layer (bf16), against `torch.linalg.svdvals` on the same device."""
    rows: list[Result] = []
    problems = []
    for name, shape in LLAMA_8B_LAYER.items():
        rows_of, columns = (side // 64 for side in shape) if place.small else shape
        generator = torch.Generator(place.device).manual_seed(0)
        weight = torch.randn(rows_of, columns, generator=generator, device=place.device) * 0.02
        weight = weight.bfloat16()
        # both read the same entries; svdvals takes no bf16, and ours widens them itself
        ours, facts = timed(place, partial(spectral_facts, weight))
        theirs, values = timed(place, partial(torch.linalg.svdvals, weight.float()))
        kappa = float(values[0] / values[-1])
        difference = abs(facts.condition_number / kappa - 1)
        rows.append(
            {"name": name, "shape": list(weight.shape), "seconds": ours, "seconds_svdvals": theirs}
            | {"method": facts.method, "difference": difference}
        )
        if not difference <= 1e-2:  # svdvals itself is fp32: of a square's κ it keeps two to three digits
            problems.append(f"{name}: κ {facts.condition_number:.4g}, svdvals {kappa:.4g}")
    seconds, svdvals = (sum(row[key] for row in rows) for key in ("seconds", "seconds_svdvals"))
    return {
        "weights": rows,
        "seconds_a_layer": seconds,
        "seconds_a_layer_svdvals": svdvals,
        "speedup": svdvals / seconds,
        "seconds_all_layers": LAYERS_OF_8B * seconds,
        "problems": problems,
    }


def _error(facts: SpectralFacts | None, matrix: Tensor) -> float:
    return math.inf if facts is None else abs(facts.condition_number / _condition_number(matrix) - 1)


def _condition_number(matrix: Tensor) -> float:
    """By NumPy's SVD in fp64, on the CPU."""
    values: Any = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(values[0] / values[-1])
