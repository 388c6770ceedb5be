"""A study's tables, from its JSONL alone: forgetting at equal adaptation, its ratios, and what was not run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condft.files.atomic import write_text
from scripts.research.config import DISTILLED, StudyConfig
from scripts.research.statistics import mean_interval
from scripts.research.study.across import across_tables, draw_levels
from scripts.research.study.figures import draw_curves, draw_fronts, draw_ratios
from scripts.research.study.levels import Ratio, paired_ratio, value_at_level
from scripts.research.study.plan import RunSpec, best_of_sweep, count_runs
from scripts.research.study.results import Results, best_rates, sweep_curves
from scripts.research.tables import table, with_interval

REFERENCES = (
    "lowest_within_type",
    "lowest_within_type_distilled",
    "fisher_within_type",
    "lora_all_linear_distilled",
)
"""Arms that others are compared with: the default, the best rule by gradients, and two with self-distillation."""
MEASURES = {
    "text_ce_change": "Δ text cross-entropy",
    "kl_to_base": "KL to the base",
    "cloze_change": "Δ cloze log-probability",
}
_OWN_BASES = [
    "Each seed has a base of its own, pre-trained from that seed, and rates of its own: the intervals are over bases.",
    "",
]
# a ratio needs quantities that grow from 0 with forgetting
_RATIO_MEASURES = ("text_ce_change", "kl_to_base")


@dataclass(frozen=True)
class ArmRuns:
    """An arm's finished runs at the rates that its sweeps chose for a level.

    Attributes:
        name: Of the arm.
        rates: The chosen rate, or several where every seed has a sweep of its own; the best of those tried where a
            sweep is not finished.
        sweep: How many rates were tried by the seeds that sweep, and how many are planned.
        keys: Seed -> key of the run.
    """

    name: str
    rates: tuple[float, ...]
    sweep: tuple[int, int]
    keys: dict[int, str]

    @property
    def label(self) -> str:
        """The name; with an unfinished sweep also how far it got, because its best rate may still change."""
        tried, planned = self.sweep
        return self.name if tried == planned else f"{self.name} ({tried} of {planned} rates)"

    @property
    def shown_rates(self) -> str:
        return " to ".join(f"{rate:g}" for rate in sorted({min(self.rates), max(self.rates)}))


def arms_with_runs(config: StudyConfig, results: Results, level: float) -> list[ArmRuns]:
    """Every arm that has a finished run, at the rates that are best at the level, in the study's order.

    A rate is chosen by the sweep and by `best_by`, for every measure in the tables.
    """
    keys, found = results.by_spec(), []
    for name, arm in config.arms.items():
        curves = {seed: sweep_curves(config, results, name, seed) for seed in config.sweep_seeds}
        best = {seed: best_of_sweep(tried, level) for seed, tried in curves.items()}
        rates = {seed: best[seed if seed in best else config.seeds[0]] for seed in config.seeds}
        chosen = {seed: rate for seed, rate in rates.items() if rate is not None}
        at_rate = {seed: keys[spec] for seed, rate in chosen.items() if (spec := RunSpec(name, rate, seed)) in keys}
        finished = {seed: key for seed, key in at_rate.items() if results.runs[key]["status"] == "finished"}
        if chosen:
            sweep = (sum(map(len, curves.values())), len(arm.rates) * len(curves))
            found.append(ArmRuns(name, tuple(sorted(set(chosen.values()))), sweep, finished))
    return found


def at_level(results: Results, arm: ArmRuns, measure: str, level: float) -> dict[int, float]:
    """Seed -> the measure where the run's test loss fell to the level; seeds that never get there are left out."""
    values = {seed: value_at_level(results.curve(key, measure), level) for seed, key in arm.keys.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def compare(results: Results, ours: ArmRuns, theirs: ArmRuns, measure: str, level: float) -> Ratio | None:
    """Ratio of a measure of forgetting at a level over the seeds that both arms have; None if they share none."""
    pairs = _paired(results, ours, theirs, measure, level)
    return paired_ratio(*zip(*pairs, strict=True)) if pairs else None


def _paired(results: Results, ours: ArmRuns, theirs: ArmRuns, measure: str, level: float) -> list[tuple[float, float]]:
    left, right = (at_level(results, arm, measure, level) for arm in (ours, theirs))
    return [(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())]


def write_report(config: StudyConfig, results: Results) -> list[Path]:
    """Writes the tables and figures next to the JSONL and returns their paths.

    Raises:
        ValueError: No run of this study is finished.
    """
    by_level = {level: arms_with_runs(config, results, level) for level in config.levels}
    if not by_level[config.levels[0]]:
        raise ValueError(f"{config.results} holds no finished run of this study ({config.digest()}): run it first")
    stem = Path(config.results).with_suffix("")
    text = [f"# Study of task {stem.name}: tables", "", *_inventory(config, results)]
    for level, arms in by_level.items():
        text += ["", *_level_table(results, arms, level)]
        for measure in _RATIO_MEASURES:
            text += ["", *_ratio_table(results, arms, measure, level)]
        text += _distilled_table(results, arms, level)
        text += ["", *_end_table(results, arms, level)]
    text += across_tables(config, results, REFERENCES, {measure: MEASURES[measure] for measure in _RATIO_MEASURES})
    written = [stem.with_suffix(".md")]
    write_text(written[0], "\n".join(text) + "\n")
    for level, arms in by_level.items():
        labeled = _labeled_points(config, results, arms)
        fronts, curves = Path(f"{stem}_fronts_{level:g}.png"), Path(f"{stem}_curves_{level:g}.png")
        rates = f"(rates best at test loss {level:g})"
        draw_fronts(labeled, fronts, title=f"Task {stem.name}: forgetting against adaptation {rates}")
        draw_curves(labeled, curves, title=f"Task {stem.name}: adaptation over training {rates}")
        written += [fronts, curves]
        if references := _drawn_ratios(results, arms, config.best_by, level):
            written.append(Path(f"{stem}_ratios_{level:g}.png"))
            title = f"Task {stem.name}: {MEASURES[config.best_by]} of one arm over another's, test loss {level:g}"
            draw_ratios(references, written[-1], title=title)
    across = Path(f"{stem}_across.png")
    title = f"Task {stem.name}: {MEASURES[config.best_by]} of one arm over another's, at equal test loss"
    if draw_levels(config, results, REFERENCES, across, title=title):
        written.append(across)
    return written


def _labeled_points(
    config: StudyConfig, results: Results, arms: Sequence[ArmRuns]
) -> list[tuple[str, list[list[dict[str, Any]]]]]:
    """What the figures show: the main arms and the references; all arms would be too many lines to distinguish."""
    shown = [arm for arm in arms if config.arms[arm.name].main or arm.name in REFERENCES] or arms
    return [(f"{arm.name} ({arm.shown_rates})", [results.points[key] for key in arm.keys.values()]) for arm in shown]


def _drawn_ratios(
    results: Results, arms: Sequence[ArmRuns], measure: str, level: float
) -> dict[str, dict[str, tuple[list[float], Ratio]]]:
    """Of the references, over every arm that has two seeds or more in common with them."""
    found: dict[str, dict[str, tuple[list[float], Ratio]]] = {}
    for ours in arms:
        for theirs in arms:
            pairs = _paired(results, ours, theirs, measure, level)
            if ours.name in REFERENCES and theirs is not ours and len(pairs) > 1:
                ratio = paired_ratio(*zip(*pairs, strict=True))
                if ratio.value > 0:  # a log scale has no place for others
                    ratios = [left / right for left, right in pairs if right > 0]
                    found.setdefault(ours.name, {})[theirs.name] = (ratios, ratio)
    return found


def _inventory(config: StudyConfig, results: Results) -> list[str]:
    runs = list(results.runs.values())
    failed = [run for run in runs if run["status"] != "finished"]
    hours = sum(run["seconds"] for run in runs) / 3600
    commits = sorted({(run["commit"] or "unknown")[:12] for run in runs})
    keys, best = results.by_spec(), best_rates(config, results)
    planned = count_runs(config.arms, config.seeds, best, config.sweep_seeds)
    lines = [
        f"{len(runs) - len(failed)} runs finished, {len(failed)} failed, of {planned} planned; {hours:.1f} hours in "
        f"all, at commit {', '.join(commits)}. Settings `{config.digest()}`.",
        "",
        *_OWN_BASES * config.own_bases,
    ]
    rows = []
    for name, arm in config.arms.items():
        rates = [rate for rate in arm.rates if RunSpec(name, rate, config.seeds[0]) in keys]
        swept = arm.rates if config.own_bases else best[name]
        others = {rate: [s for s in config.seeds[1:] if RunSpec(name, rate, s) in keys] for rate in arm.rates}
        due = len(arm.rates) + (len(config.seeds) - 1) * max(1, len(swept))
        missing = due - len(rates) - sum(len(others[rate]) for rate in swept)
        shown = ", ".join(f"{rate:g}" for rate in rates) or "none"
        seeds = "; ".join(f"{', '.join(map(str, found))} at {rate:g}" for rate, found in others.items() if found)
        rows.append([name, shown, seeds or "none", str(missing)])
    lines += table(["arm", "rates run on the first seed", "other seeds run", "not run"], rows)
    lines += [f"\nFailed: {run['arm']} lr {run['rate']:g} seed {run['seed']}: {run['error']}" for run in failed]
    return lines


def _level_table(results: Results, arms: Sequence[ArmRuns], level: float) -> list[str]:
    rows = []
    for arm in arms:
        values = {measure: list(at_level(results, arm, measure, level).values()) for measure in MEASURES}
        reached = f"{len(values['text_ce_change'])} of {len(arm.keys)}"
        cells = [_mean(found) if found else "not reached" for found in values.values()]
        sweep = f"{arm.sweep[0]} of {arm.sweep[1]}"
        rows.append([arm.name, arm.shown_rates, sweep, reached, *cells])
    title = f"## At test loss {level:g} (mean over seeds, 95 % bootstrap interval from two seeds on)"
    return [title, "", *table(["arm", "rate", "sweep", "seeds there", *MEASURES.values()], rows)]


def _ratio_table(results: Results, arms: Sequence[ArmRuns], measure: str, level: float) -> list[str]:
    by_name = {arm.name: arm for arm in arms}
    references = [by_name[name] for name in REFERENCES if name in by_name]
    title = f"## Ratio of {MEASURES[measure]} at test loss {level:g} (below 1: forgets less than the control)"
    found: list[Ratio] = []
    rows = []
    for control in arms:
        ratios = [None if arm is control else compare(results, arm, control, measure, level) for arm in references]
        if any(ratios):
            rows.append([control.label, *map(_ratio, ratios)])
            found += [ratio for ratio in ratios if ratio]
    if not found:
        return [title, "", "No pair of arms got there."]
    if all(math.isnan(ratio.value) for ratio in found):
        return [title, "", "None: no control's mean is above 0 there."]
    return [title, "", *table(["control", *(f"{arm.label}: ratio, seeds, effect size" for arm in references)], rows)]


def _distilled_table(results: Results, arms: Sequence[ArmRuns], level: float) -> list[str]:
    """Of every arm that was run with and without self-distillation, and got there; empty if there is none."""
    by_name = {arm.name: arm for arm in arms}
    rows = []
    for plain in arms:
        if distilled := by_name.get(plain.name + DISTILLED):
            ratios = [compare(results, distilled, plain, measure, level) for measure in _RATIO_MEASURES]
            if any(ratios):
                done = distilled.sweep[0] == distilled.sweep[1]
                rows.append([plain.name if done else f"{plain.label}, {distilled.label}", *map(_ratio, ratios)])
    title = f"## Self-distillation at test loss {level:g}: the arm with it over the same without"
    head = ["arm", *(MEASURES[measure] for measure in _RATIO_MEASURES)]
    return ["", title, "", *table(head, rows)] if rows else []


def _end_table(results: Results, arms: Sequence[ArmRuns], level: float) -> list[str]:
    head = ["arm", "trained parameters", "test loss", "of each seed", "WER"]
    head += ["Δ cross-entropy, long text", "Δ cross-entropy, short text", "training (s)"]
    rows = []
    for arm in arms:
        runs = [results.runs[key] for key in arm.keys.values()]
        last = [results.points[key][-1] for key in arm.keys.values()]
        rates = [point["wer"] for point in last if "wer" in point]
        long_text = [run["final_text_ce_change"] for run in runs if "final_text_ce_change" in run]
        cells = [
            f"{runs[0]['trainable_parameters']:,}",
            _mean([point["test_loss"] for point in last]),
            ", ".join(f"{seed}: {point['test_loss']:.2f}" for seed, point in zip(arm.keys, last, strict=True)),
            _mean(rates) if rates else "",
            _mean(long_text) if long_text else "",
            _mean([point["text_ce_change"] for point in last]),
            f"{mean_interval([run['seconds_train'] for run in runs])[0]:.0f}",
        ]
        rows.append([arm.name, *cells])
    title = f"## At the end of the runs (unequal adaptation; rates best at test loss {level:g})"
    return [title, "", *table(head, rows)]


def _mean(values: Sequence[float]) -> str:
    return with_interval(*mean_interval(values), digits=4)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if math.isnan(ratio.value):
        return f"none (control ≤ 0), n = {ratio.num_seeds}"
    effect = "" if math.isnan(ratio.effect_size) else f", d = {ratio.effect_size:.1f}"
    return f"{with_interval(ratio.value, ratio.low, ratio.high)}, n = {ratio.num_seeds}{effect}"
