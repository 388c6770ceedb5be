"""The figures of docs/results/tuner.json as rows: whole for the console, and in short for the results page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HEADINGS", "Figure", "figures", "markdown"]

HEADINGS = ("figure", "on", "dtype", "measured", "middle half", "CPU time", "products", "target", "met")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: What is compared.
        model: On what.
        dtype: Of the base.
        value: A ratio, seconds, or whether something holds.
        target: What the value may be at most; None for a figure without one.
        low, high: Quartiles over the rounds.
        cpu: The ratio in CPU time.
        products: The ratio that the flops of the dense products alone would give.
        unit: Behind the value.
        digits: Of the value.
    """

    name: str
    model: str
    dtype: str
    value: float | bool
    target: float | None = None
    low: float | None = None
    high: float | None = None
    cpu: float | None = None
    products: float | None = None
    unit: str = "x"
    digits: int = 2

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if isinstance(self.value, bool):
            return self.value
        return None if self.target is None else self.value <= self.target

    @property
    def limit(self) -> str:
        """The target as it is shown."""
        return "" if self.target is None else f"≤ {self.written(self.target)}"

    def cells(self) -> tuple[str, ...]:
        """As `HEADINGS`."""
        spread = "" if self.low is None else f"{self.written(self.low)}-{self.written(self.high)}"
        met = {None: "", True: "yes", False: "no"}[self.met]
        measured = (self.written(self.value), spread, self.written(self.cpu), self.written(self.products))
        return (self.name, self.model, self.dtype, *measured, self.limit, met)

    def written(self, value: float | bool | None) -> str:
        """A value with this figure's digits and unit."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.{self.digits}f}{self.unit}"


def figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Every figure that the results hold, in the order of the targets."""
    for name, rival, target in (
        ("step, against unfrozen by hand", "unfrozen", 1.03),
        ("step, against LoRA r=16 on all linear layers", "lora", 1.0),
    ):
        for row in results.get("steps", []):
            yield _ratio(name, "SmolLM2", row["dtype"], row[f"against_{rival}"], target)
    for row in results.get("distilled", []):
        yield _ratio(
            "step with self-distillation, against without", "SmolLM2", row["dtype"], row["against_plain"], 1.5
        )
    for row in results.get("experts", []):
        work = f"{row['work']}, {row['implementation']}, {row['tokens']} tokens"
        name = "a quarter of the experts, against LoRA `target_parameters`"
        yield _ratio(name, work, row["dtype"], row["against_lora"], 0.6, row["share_of_products"])
    for row in results.get("memory", []):
        model, dtype = row["work"].split()
        # Over an fp32 base the weights are their own masters, and the base's copy comes on top.
        limit = None if dtype == "float32" else 1.02
        yield Figure("peak memory, against unfrozen with fp32 masters", model, dtype, row["ratio"], limit, digits=3)
        yield Figure("optimizer state exactly the selection's", model, dtype, row["optimizer_state_exact"])
    if "start" in results:
        beyond = results["start"]["seconds_beyond_lora"]
        yield Figure("`get_peft_model`, report cached, beyond LoRA's", "SmolLM2", "float32", beyond, 1.0, unit=" s")
    for row in results.get("files", []):
        size = f"SmolLM2, {row['bytes'] / 1e6:.0f} MB"
        for verb in ("save", "load"):
            name = f"adapter {verb}, against safetensors' write"
            yield _ratio(name, size, "float32", row[f"{verb}_against_write"], 1.5)
    for row in results.get("merged", []):
        model, dtype = row["work"].split()
        yield _ratio("merged model's forward, against the base's", model, dtype, row["against_base"], None)
        is_same = all(row[key] for key in ("same_modules_and_tensors", "logits_moved", "logits_are_the_adapters"))
        yield Figure("merged: the base's modules, the adapter's logits to the bit", model, dtype, is_same)


def _ratio(
    name: str, model: str, dtype: str, found: Mapping[str, float], target: float | None, products: float | None = None
) -> Figure:
    spread = found["low"], found["high"], found["cpu_ratio"]
    return Figure(name, model, dtype, found["ratio"], target, *spread, products)


def markdown(rows: Sequence[Figure]) -> str:
    """A column for each dtype; a figure that misses its target in bold; the products' ratio in brackets."""
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for row in rows:
        found.setdefault((row.name, row.model), {})[row.dtype] = row
    lines: list[tuple[str, ...]] = [("figure", "on", *DTYPES, "target"), ("---",) * 5]
    for (name, model), by_dtype in found.items():
        cells = [_short(by_dtype[dtype]) if dtype in by_dtype else "" for dtype in DTYPES]
        limits = [row.limit for row in by_dtype.values()]
        lines.append((name, model, *cells, max(limits, key=len)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _short(row: Figure) -> str:
    value = row.written(row.value)
    value = f"**{value}**" if row.met is False else value
    return value if row.products is None else f"{value} ({row.written(row.products)})"
