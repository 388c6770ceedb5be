"""The figures of results/tuner.json as rows, for the console and for Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HEADINGS", "Figure", "figures", "markdown"]

HEADINGS = ("figure", "model", "measured", "middle half", "CPU time", "target", "met")
GROUPED = "grouped_mm"


@dataclass(frozen=True)
class Figure:
    """One row; `target` None for what is told beside the targets."""

    name: str
    model: str
    value: float | bool
    target: float | None = None
    low: float | None = None
    high: float | None = None
    cpu: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if isinstance(self.value, bool):
            return self.value
        return None if self.target is None else self.value <= self.target

    def cells(self) -> tuple[str, ...]:
        target = "" if self.target is None else f"≤ {self._written(self.target)}"
        spread = "" if self.low is None or self.high is None else f"{self.low:.2f}-{self.high:.2f}"
        cpu = "" if self.cpu is None else self._written(self.cpu)
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return (self.name, self.model, self._written(self.value), spread, cpu, target, met)

    def _written(self, value: float | bool) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        digits = 3 if self.name.startswith("peak memory") else 2
        return f"{value:.{digits}f}{self.unit}"


def figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Every row that the results hold figures for, in the order of the targets."""
    for row in results.get("steps", []):
        model = f"SmolLM2 {row['dtype']}"
        yield _ratio("step, against unfrozen by hand", model, row["against_unfrozen"], 1.03)
    for row in results.get("steps", []):
        model = f"SmolLM2 {row['dtype']}"
        yield _ratio("step, against LoRA r=16 on all linear layers", model, row["against_lora"], 1.0)
    for row in results.get("experts", []):
        name = f"{row['work']}, {row['implementation']}, {row['dtype']}, {row['tokens']} tokens"
        yield _ratio("quarter of the experts, against LoRA target_parameters", name, row["against_lora"], 0.6)
        if row["implementation"] == GROUPED:
            yield Figure("of that: flops of the products alone", name, row["share_of_products"])
    for row in results.get("memory", []):
        # Over a fp32 base the weights are their own masters, and the base's copy comes on top.
        target = 1.02 if "bfloat16" in row["work"] else None
        yield Figure("peak memory, against unfrozen with fp32 masters", row["work"], row["ratio"], target)
        yield Figure("optimizer state is the selection's alone", row["work"], row["optimizer_state_exact"])
    if "start" in results:
        beyond = results["start"]["seconds_beyond_lora"]
        yield Figure("get_peft_model beyond LoRA's, report cached", "SmolLM2", beyond, 1.0, unit=" s")
    if "files" in results:
        saved, loaded = (results["files"][f"{verb}_against_write"] for verb in ("save", "load"))
        yield _ratio("adapter saved, against safetensors' write", "SmolLM2", saved, 1.5)
        yield _ratio("adapter loaded, against the same", "SmolLM2", loaded, 1.5)
    for row in results.get("merged", []):
        yield _ratio("merged forward, against the base's", row["work"], row["against_base"], None)
        is_same = all(row[key] for key in ("same_modules_and_tensors", "logits_moved", "logits_are_the_adapters"))
        yield Figure("merged: the base's very modules, the adapter's very logits", row["work"], is_same)


def _ratio(name: str, model: str, found: Mapping[str, float], target: float | None) -> Figure:
    return Figure(name, model, found["ratio"], target, found["low"], found["high"], found["cpu_ratio"])


def markdown(rows: Sequence[Figure]) -> str:
    """A table for the README."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
