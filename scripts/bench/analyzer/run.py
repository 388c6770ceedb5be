"""Times the analyzer against PEFT's KappaTuneSelector: same weights, same threads, same run, in turns.

    python -m scripts.bench.analyzer                 # everything, into docs/results/analyzer.json; half an hour
    python -m scripts.bench.analyzer --only smollm2  # one part; the others of an existing file are kept

Medians over `--repeats`; speed-ups are ratios within one run. In addition to the races: the error of κ over planted
spectra and over SmolLM2's layer weights, batched calls against threads on the CPU, the distance to what the routes
must move and multiply, memory of a streamed checkpoint, two processes, and how cost grows. Needs
models/smollm2-135m-instruct (`python -m scripts.data.get_models`) for the first race and its error, and 4 GB of disk
for the streamed checkpoint.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from condft.files.atomic import write_json
from condft.runtime.console import console
from condft.spectra import spectral_facts
from scripts.bench.analyzer.batches import batches_against_threads
from scripts.bench.analyzer.errors import error_grid, error_over_model
from scripts.bench.analyzer.limit import distance_to_limit, machine_rates
from scripts.bench.analyzer.processes import shared_by_two
from scripts.bench.analyzer.races import LLAMA_8B_LAYER, WORK, linears, race, smollm2, timed
from scripts.bench.analyzer.scaling import extrapolate, plot_scaling, scaling
from scripts.bench.analyzer.streaming import streaming
from scripts.bench.results import arguments_of, earlier_results, made_by

__all__ = ["limits", "main", "show"]

LIMIT_SHAPES = ((4096, 4096), (14336, 4096), (4096, 1024), (1024, 1024))


def limits(repeats: int, shapes: tuple[tuple[int, int], ...] = LIMIT_SHAPES) -> list[dict[str, Any]]:
    """Each route's time over that of its own passes and flops at this machine's rates."""
    rates = machine_rates()
    rows = []
    for shape in shapes:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        for measures in ("basic", "all"):
            work = partial(spectral_facts, matrix, measures=measures)
            seconds = statistics.median(timed(work)[0] for _ in range(repeats))
            found = distance_to_limit(work, matrix.numel() // 64, rates, seconds)
            rows.append({"shape": shape, "measures": measures, "method": work().method, **found, **rates})
    return rows


def grown(repeats: int) -> dict[str, Any]:
    """How cost grows, with its picture."""
    found = scaling(repeats)
    plot_scaling(found, Path("docs/results/analyzer_scaling.png"))
    return {**found, "extrapolated": extrapolate(found)}


PARTS: dict[str, Callable[[int], Any]] = {
    "error": lambda repeats: error_grid(),
    "error_smollm2": lambda repeats: error_over_model(smollm2()),
    "batches": batches_against_threads,
    "limits": limits,
    "streamed": lambda repeats: streaming(Path("runs/bench_streamed_checkpoint")),
    "ranks": lambda repeats: shared_by_two(linears(LLAMA_8B_LAYER)),
    "scaling": grown,
}


def show(results: dict[str, Any]) -> None:
    """The races as a table, everything else as lines."""
    table = Table(title="condft.analyze against KappaTuneSelector (medians, seconds)", title_justify="left")
    for heading in ("work", "selector", "κ", "speed-up", "goal", "all measures", "keep_lowest", "second start"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for row in results.get("races", {}).values():
        s = row["seconds"]
        kept = f"{row['speedup_keep_lowest']:.1f}x" if "speedup_keep_lowest" in row else ""
        second = f"{s['second_start']:.3f} s, {row['second_start_share']:.1%}"
        figures = (f"{s['selector']:.2f}", f"{s['basic']:.2f}", f"{row['speedup']:.1f}x", f"{row['target']:.0f}x")
        table.add_row(row["work"], *figures, f"{row['speedup_all']:.1f}x", kept, second)
    console().print(table)
    for row in results.get("limits", []):
        print(f"{row['shape']!s:>14} {row['measures']:5} {row['method']:8} {row['ratio']:.2f} of the limit (goal 2)")
    for part in ("error_smollm2", "batches", "streamed", "ranks", "scaling"):
        if part in results:
            print(part, json.dumps(results[part], indent=1))
    for row in results.get("error", []):
        routes = ", ".join(row["methods"])
        error = "inf, or a lower bound" if row["error"] is None else f"error {row['error']:.1e}"
        print(f"{row['shape']!s:>14} {row['dtype']} κ {row['planted_kappa']:.0e} {error} by {routes}")


def main() -> None:
    arguments = arguments_of(__doc__, [*WORK, *PARTS], "docs/results/analyzer.json", repeats=3)
    results = earlier_results(arguments)
    results.setdefault("races", {})
    for name in arguments.only or [*WORK, *PARTS]:
        if name in WORK:
            results["races"][name] = race(name, arguments.repeats)
        else:
            results[name] = PARTS[name](arguments.repeats)
        results["made_by"][name] = made_by("python -m scripts.bench.analyzer", arguments.repeats)
        write_json(arguments.out, results)
    show(results)
