"""Times the analyzer beside PEFT's KappaTuneSelector: same weights, same threads, same run, turn and turn about.

    python scripts/bench_analyzer.py                   # the table, into results/analyzer.json; about ten minutes
    python scripts/bench_analyzer.py --only error      # the error grid alone

Medians over `--repeats`. Speed-ups are ratios within this run. The selector computes κ of Linear weights and, for
fused experts, the mean κ of the stack; ours is timed for the same κ (`basic`) and again with all measures.
Needs models/smollm2-135m-instruct (scripts/get_models.py) for the first row.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import KappaTuneSelector
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

from condft.analysis import analyze
from condft.console import console
from condft.files import write_json
from condft.recipe.summary import code_commit, machine, versions
from condft.spectra import spectral_facts

LLAMA_8B_LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
EXPERTS = (128, 768, 2048)
TARGETS = {"smollm2": 4.0, "4096x4096": 8.0, "14336x4096": 6.0, "llama-8b layer": 7.0, "128 experts": 4.0}


class Experts(nn.Module):
    """A fused stack under a name that the selector looks for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, generator=generator) * 0.02)


def linears(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Gaussian weights of standard deviation 0.02, as models are initialised; seeded by position."""
    layers = nn.ModuleDict()
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        layer = nn.Linear(columns, rows, bias=False)
        generator = torch.Generator().manual_seed(index)
        layer.weight = nn.Parameter(torch.randn(rows, columns, generator=generator) * 0.02)
        layers[name] = layer
    return layers


def smollm2() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained("models/smollm2-135m-instruct", use_safetensors=True)
    return model.get_submodule("model.layers")


WORK: dict[str, Callable[[], nn.Module]] = {
    "smollm2": smollm2,
    "4096x4096": lambda: linears({"square": (4096, 4096)}),
    "14336x4096": lambda: linears({"tall": (14336, 4096)}),
    "llama-8b layer": lambda: linears(LLAMA_8B_LAYER),
    "128 experts": lambda: nn.ModuleDict({"experts": Experts()}),
}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def selector_kappas(model: nn.Module) -> dict[str, float]:
    selector = KappaTuneSelector(model, show_progress=False)
    selector.get_best_targets(num_modules=1)
    selector.get_best_target_parameters(num_modules=1)
    linear, stacks = selector._condition_numbers or {}, selector._parameter_condition_numbers or {}
    return {f"{name}.weight": kappa for name, kappa in linear.items()} | stacks


def race(name: str, repeats: int) -> dict[str, Any]:
    """Both, turn and turn about, so that a slow spell of the machine hits both."""
    model = WORK[name]()
    seconds: dict[str, list[float]] = {"selector": [], "basic": [], "all": []}
    for _ in range(repeats):
        taken, theirs = timed(lambda: selector_kappas(model))
        seconds["selector"].append(taken)
        taken, report = timed(lambda: analyze(model, progress=False))
        seconds["basic"].append(taken)
        taken, _ = timed(lambda: analyze(model, measures="all", progress=False))
        seconds["all"].append(taken)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    ours = {row.name: row.condition_number for row in report.rows}  # a stack's mean has no counterpart here
    shared = sorted(ours.keys() & theirs.keys())
    return {
        "work": name,
        "seconds": medians,
        "runs": seconds,
        "speedup": medians["selector"] / medians["basic"],
        "speedup_all": medians["selector"] / medians["all"],
        "target": TARGETS[name],
        "same_order": sorted(shared, key=ours.__getitem__) == sorted(shared, key=theirs.__getitem__)
        if shared
        else None,
        "methods": sorted({row.method for row in report.rows}),
    }


def error_grid() -> list[dict[str, Any]]:
    """Largest relative error of κ against NumPy's fp64 SVD, over planted spectra in fp64 and as stored in fp32."""
    rows = []
    for shape in ((192, 576), (576, 576), (1024, 1024), (1536, 576), (600, 560), (8192, 128)):
        for decade in range(0, 13, 2):
            for dtype in (torch.float64, torch.float32):
                errors, methods = [], set()
                for seed, spacing in enumerate((np.geomspace, np.linspace)):
                    matrix = planted(shape, spacing(10.0**decade, 1.0, min(shape)), seed).to(dtype)
                    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
                    facts = spectral_facts(matrix)
                    if math.isfinite(facts.condition_number):
                        errors.append(abs(facts.condition_number * values[-1] / values[0] - 1))
                    methods.add(facts.method)
                name = str(dtype).removeprefix("torch.")
                row = {"shape": shape, "planted_kappa": 10.0**decade, "dtype": name}
                # None: both numerically rank-deficient by the analyzer's definition, κ past 1 / (max(m, n) eps).
                rows.append(row | {"error": float(max(errors)) if errors else None, "methods": sorted(methods)})
    return rows


def planted(shape: tuple[int, int], spectrum: np.ndarray, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    n = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], n)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], n)))[0]
    return torch.from_numpy(left * spectrum @ right.T)


def show(results: dict[str, Any]) -> None:
    table = Table(title="condft.analyze beside KappaTuneSelector (medians, seconds)", title_justify="left")
    for heading in ("work", "selector", "κ", "all measures", "speed-up κ", "target", "speed-up all", "routes"):
        table.add_column(heading, justify="left" if heading in ("work", "routes") else "right")
    for row in results["races"]:
        s = row["seconds"]
        ratios = (f"{row['speedup']:.1f}x", f"{row['target']:.0f}x", f"{row['speedup_all']:.1f}x")
        figures = (f"{s['selector']:.2f}", f"{s['basic']:.2f}", f"{s['all']:.2f}")
        table.add_row(row["work"], *figures, *ratios, ", ".join(row["methods"]))
    console().print(table)
    for row in results["errors"]:
        routes = ", ".join(row["methods"])
        error = "inf by definition" if row["error"] is None else f"error {row['error']:.1e}"
        print(f"{row['shape']!s:>14} {row['dtype']} κ {row['planted_kappa']:.0e} {error} by {routes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*WORK, "error"], action="append", help="leave the rest out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/analyzer.json"))
    arguments = parser.parse_args()
    chosen = arguments.only or [*WORK, "error"]
    results: dict[str, Any] = {
        "script": "scripts/bench_analyzer.py",
        "machine": machine(),
        "commit": code_commit(),
        "versions": versions(),
        "repeats": arguments.repeats,
        "races": [],
        "errors": [],
    }
    for name in chosen:
        if name == "error":
            results["errors"] = error_grid()
        else:
            results["races"].append(race(name, arguments.repeats))
        write_json(arguments.out, results)
    show(results)


if __name__ == "__main__":
    main()
