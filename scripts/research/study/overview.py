"""The README's picture: how much each method forgets where all have learned the same, in LoRA's amount.

python -m scripts.research.study.overview docs/images/forgetting.svg   # from the committed JSONL alone; 20 seconds
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from condft.files.atomic import atomic_path
from scripts.research.config import load_study
from scripts.research.study.across import forgotten
from scripts.research.study.levels import Across, ratio_across
from scripts.research.study.results import Results

CONTROL = "lora_all_linear"
METHODS = {
    CONTROL: ("LoRA r=16, all linear layers", "#9aa0a6"),
    "full_fine_tuning": ("full fine-tuning", "#5f6368"),
    "lowest_within_type": ("condft: low κ trains", "#90caf9"),
    "lowest_within_type_distilled": ("condft: low κ and self-distillation (the recipe)", "#0d47a1"),
}
# Each study's own measure of forgetting (`best_by` of its YAML), as in docs/results/index.md.
STUDIES = {
    "configs/study/speech.yaml": "a 135M LLM\nlearns speech",
    "configs/study/text.yaml": "a 135M LLM\nlearns German prose",
    "configs/study/moe_bases.yaml": "six small MoEs\nlearn German prose",
}
_TOP = 1.35  # the axis ends here; no bar is cut off today, and a longer interval would only lose its cap

Ratios = Mapping[str, Mapping[str, Across]]
"""Task -> arm -> its forgetting over the control's."""


def ratios_to_control() -> dict[str, dict[str, Across]]:
    """Every task's ratios to LoRA: geometric means over 21 levels of equal test loss."""
    found = {}
    for path, label in STUDIES.items():
        config = load_study(path)
        arms = forgotten(config, Results(config), config.best_by)
        found[label] = {name: ratio_across(arms[name], arms[CONTROL]) for name in METHODS}
    return found


def draw_overview(ratios: Ratios, path: Path) -> None:
    """Bars of each method in groups of a task, with 95 % intervals.

    Args:
        ratios: What `ratios_to_control` gives.
        path: Image file, written atomically; an SVG is the same to the byte whenever it is drawn.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    width = 0.8 / len(METHODS)
    for index, (name, (label, color)) in enumerate(METHODS.items()):
        places = [group + (index - (len(METHODS) - 1) / 2) * width for group in range(len(ratios))]
        across = [task[name] for task in ratios.values()]
        axes.bar(places, [each.value for each in across], 0.92 * width, color=color, label=label)
        for place, each in zip(places, across, strict=True):
            if name != CONTROL:
                axes.plot([place, place], [each.low, each.high], color="black", linewidth=0.8)
            edge = each.value if name == CONTROL else each.high
            axes.annotate(f"{each.value:.2f}", (place, edge), (0, 2), textcoords="offset points", ha="center", size=9)
    axes.set_xticks(range(len(ratios)), list(ratios), fontsize=10)
    axes.set_ylabel("forgotten (LoRA = 1)")
    axes.set_ylim(0, _TOP)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.suptitle("What the model forgot when all methods have learned the same", fontsize=12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    # Fixed ids and no date: the file changes in git only where a figure changes.
    with rc_context({"svg.hashsalt": "condft"}), atomic_path(path) as partial:
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata)


def main(path: Annotated[Path, typer.Argument(help="Picture to draw (.svg, .png, .pdf).")]) -> None:
    """Draws the README's picture."""
    draw_overview(ratios_to_control(), path)


if __name__ == "__main__":
    typer.run(main)
