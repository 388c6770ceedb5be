"""Selections by what training a unit must cost: the curvature of the KL divergence on text that the base itself wrote.

No pre-training data: the text is the base's own, the gain (where it is asked) is measured on the new task's batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from _gradients import adam_directions, fisher_information
from _study_selections import choose
from torch import Tensor

from condft import SpectralReport


def lowest_fisher(
    model: Any,
    report: SpectralReport,
    fraction: float,
    own_tokens: Tensor,
    losses: Sequence[Callable[[], Tensor]],
    *,
    per_gain: bool,
    **rule: Any,
) -> tuple[str, ...]:
    r"""The units whose training should change the base least, at equal step or at equal gain.

    AdamW's first steps move every entry by about the learning rate. A step of norm $s$ along the unit's direction $d$
    (see `adam_directions`) has $\mathrm{KL} \approx \frac12 s^2 d^\top F d$ and gains $s \cdot \mathrm{slope}$.

    Args:
        model: The base, frozen; left so.
        report: Of the candidate units.
        fraction: Budget, of their parameters.
        own_tokens: `(num_sequences, length)`, drawn from the base.
        losses: One a batch of the task, two or more: the base's mean loss over it. Only asked for with `per_gain`.
        per_gain: Rank by $d^\top F d / \mathrm{slope}^2$, the divergence at equal first-order gain; else by the trace
            of F per parameter, which does not look at the task.
        rule: Of `select_units`: stratify.
    """
    names = [row.name for row in report.rows]
    found = adam_directions(model, names, losses) if per_gain else {}
    directions = {name: found[name]["direction"] if per_gain else None for name in names}
    fisher = fisher_information(model, directions, own_tokens)

    def cost(name: str, parameters: int) -> float:
        trace, along = fisher[name]
        return along / found[name]["slope"] ** 2 if per_gain else trace / parameters

    # The cost in the place of κ: then `select_units` deals out this budget as it does every other arm's.
    rows = tuple(replace(row, condition_number=cost(row.name, row.num_parameters)) for row in report.rows)
    return choose(replace(report, rows=rows), fraction, **rule)
