"""A selection by cost over gain: curvature on text sampled from the base, over the slope of the task's loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from condft import SpectralReport
from scripts.research.gradients import adam_directions, fisher_information
from scripts.research.selections import choose


def least_cost_at_equal_gain(
    model: Any,
    report: SpectralReport,
    fraction: float,
    sampled_tokens: Tensor,
    losses: Sequence[Callable[[], Tensor]],
    **rule: Any,
) -> tuple[str, ...]:
    r"""The units whose training should change the base least for the same gain on the task.

    AdamW's first steps move every entry by about the learning rate. A step of norm $s$ along the unit's direction $d$
    (see `adam_directions`) has $\mathrm{KL} \approx \frac12 s^2 d^\top F d$ and gains $s \cdot \mathrm{slope}$, so
    they are ranked by $d^\top F d / \mathrm{slope}^2$. Without the task, `score="fisher_information"` of
    `select_units` ranks by the trace of F alone.

    Args:
        model: The base, frozen; left so.
        report: Of the candidate units.
        fraction: Budget, of their parameters.
        sampled_tokens: `(num_sequences, length)`, sampled from the base.
        losses: One for each batch of the task, two or more: the base's mean loss over it.
        rule: Of `select_units`: stratify.
    """
    found = adam_directions(model, [row.name for row in report.rows], losses)
    fisher = fisher_information(model, {name: facts["direction"] for name, facts in found.items()}, sampled_tokens)
    cost = {name: fisher[name][1] / found[name]["slope"] ** 2 for name in found}
    # The cost replaces κ: `select_units` then spends this budget exactly as that of every other arm.
    rows = tuple(replace(row, condition_number=cost[row.name]) for row in report.rows)
    return choose(replace(report, rows=rows), fraction, **rule)
