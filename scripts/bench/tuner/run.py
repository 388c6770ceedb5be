"""Times the tuner against LoRA and against plain unfreezing: same batch, same selected weights, in turns.

    python -m scripts.bench.tuner                  # everything, into docs/results/tuner.json; some ten minutes
    python -m scripts.bench.tuner --only files     # one part; the others of an existing file are kept

Ratios are medians over rounds in which every contestant runs once, so what slows the machine down slows all. In
addition to the wall time there is the process's CPU time, which other processes stretch less. Real weights:
SmolLM2-135M with the tenth of its layers that the default selects. Experts: two layers of Mixtral's and of OLMoE's
proportions, random weights, a random quarter of the experts. Needs models/smollm2-135m-instruct
(`python -m scripts.data.get_models`).
"""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from rich.table import Table
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from condft.analysis.analyze import analyze
from condft.files.atomic import write_json
from condft.report import SpectralReport
from condft.runtime.console import console
from condft.selection.select import select_units
from scripts.bench.results import arguments_of, earlier_results, made_by
from scripts.bench.tuner.files import MERGED_WORK, files, merged, start
from scripts.bench.tuner.memory import MEMORY_WORK, memory
from scripts.bench.tuner.models import FRACTION, quarter_of_experts, smollm2
from scripts.bench.tuner.steps import EXPERT_WORK, STEP_WORK, distilled_steps, expert_steps, smollm2_steps
from scripts.bench.tuner.table import HEADINGS, figures, markdown

__all__ = ["PARTS", "main", "rounds"]

Tick = Callable[[], Any]


@lru_cache
def report() -> SpectralReport:
    """Of SmolLM2, measured once in this process."""
    return analyze(smollm2(), progress=False, cache=False)


def selected(fraction: float = FRACTION) -> tuple[str, ...]:
    """What `CondFTConfig(trainable_fraction=fraction)` chooses."""
    return select_units(report(), trainable_fraction=fraction).names


def steps(repeats: int, tick: Tick) -> list[dict[str, Any]]:
    return [smollm2_steps(dtype, list(selected()), repeats, tick) for dtype in STEP_WORK]


def distilled(repeats: int, tick: Tick) -> list[dict[str, Any]]:
    return [distilled_steps(dtype, list(selected()), repeats, tick) for dtype in STEP_WORK]


def experts(repeats: int, tick: Tick) -> list[dict[str, Any]]:
    return [expert_steps(*work, repeats, tick) for work in EXPERT_WORK]


def memories(repeats: int, tick: Tick) -> list[dict[str, Any]]:
    """Counted, not timed: once is enough."""
    return [
        memory(work, selected() if "smollm2" in work else quarter_of_experts(make()), tick=tick)
        for work, make in MEMORY_WORK.items()
    ]


def merges(repeats: int, tick: Tick) -> list[dict[str, Any]]:
    return [merged(work, selected() if "smollm2" in work else None, repeats, tick) for work in MERGED_WORK]


FILE_FRACTIONS = (FRACTION, 0.5)  # an adapter of the usual size, and one so large that PEFT's own part is small
PARTS: dict[str, Callable[[int, Tick], Any]] = {
    "steps": steps,
    "distilled": distilled,
    "experts": experts,
    "memory": memories,
    "start": start,
    "files": lambda repeats, tick: [files(selected(fraction), repeats, tick) for fraction in FILE_FRACTIONS],
    "merged": merges,
}


def rounds(part: str, repeats: int) -> int:
    """How often a part advances the progress bar at most."""
    return {
        "steps": len(STEP_WORK) * repeats,
        "distilled": len(STEP_WORK) * repeats,
        "experts": len(EXPERT_WORK) * repeats,
        "memory": 2 * len(MEMORY_WORK),
        "start": repeats,
        "files": len(FILE_FRACTIONS) * repeats,
        "merged": len(MERGED_WORK) * repeats,
    }[part]


def show(results: dict[str, Any]) -> None:
    """The figures as a table, and again as Markdown for the results page."""
    table = Table(title="CondFT against LoRA and against plain unfreezing", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
    for row in figures(results):
        table.add_row(*row.cells())
    console().print(table)
    print(markdown(list(figures(results))))


def main() -> None:
    arguments = arguments_of(__doc__, PARTS, "docs/results/tuner.json", repeats=11)
    results = earlier_results(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*selected weights.*")
    for part in arguments.only or PARTS:
        with tqdm(total=rounds(part, arguments.repeats), desc=part, unit="round") as bar:
            results[part] = PARTS[part](arguments.repeats, partial(bar.update, 1))
        results["made_by"][part] = made_by("python -m scripts.bench.tuner", arguments.repeats)
        write_json(arguments.out, results)
    show(results)


if __name__ == "__main__":
    main()
