"""Which units may learn: a pure function of a report and a budget. Pure Python, no torch.

Low condition numbers train, high ones stay frozen. Condition numbers are compared within a module type by default,
because across types they mostly reflect shape and role. A selection carries the share of it that shape explains, and
`shape_warning` says so if shape explains most of it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from condft.report import Role, ScreenedUnit, SpectralReport, SpectralRow
from condft.selection.budgets import units_below, units_by_count, units_within_fraction
from condft.selection.scores import Score, how_to_measure, score_of, shape_share

__all__ = [
    "CANDIDATE_ROLES",
    "DEFAULT_NUM_TENSORS",
    "Order",
    "Score",
    "Selection",
    "Stratify",
    "check_budget_and_rule",
    "check_stratify",
    "select_units",
    "shape_warning",
    "units_of_roles",
]

Order = Literal["lowest", "highest", "random"]
Stratify = Literal["module_type"]

DEFAULT_NUM_TENSORS = 100  # the paper's budget (arXiv 2506.16289)
CANDIDATE_ROLES = frozenset({Role.LAYER, Role.EXPERT})  # units of other roles train only if they are named


@dataclass(frozen=True)
class Selection:
    """The chosen units and what they were chosen from.

    Attributes:
        names: Names of the chosen units, sorted.
        num_parameters: Entries of the chosen units.
        num_candidates: How many units could have been chosen.
        candidate_parameters: Entries of all those.
        by_module_type: Module type -> (chosen, candidates), counts of units.
        score: What ranked them.
        stratify: What they were ranked within; None if all candidates were in one ranking.
        shape_share: Share of the selection, in [0, 1], that shape alone explains (`scores.shape_share`);
            0 for a random order, which uses no score.

    >>> selection = select_units(report, num_tensors=7)
    >>> len(selection.names), selection.num_candidates, selection.score, selection.stratify
    (7, 28, 'condition_number', 'module_type')
    >>> selection.by_module_type["model.layers.*.mlp.down_proj"]  # chosen, candidates
    (1, 4)
    """

    names: tuple[str, ...]
    num_parameters: int
    num_candidates: int
    candidate_parameters: int
    by_module_type: dict[str, tuple[int, int]]
    score: Score
    stratify: Stratify | None
    shape_share: float


def select_units(
    report: SpectralReport,
    *,
    num_tensors: int | None = None,
    trainable_fraction: float | None = None,
    max_condition_number: float | None = None,
    score: Score = "condition_number",
    order: Order = "lowest",
    stratify: Stratify | None = "module_type",
    seed: int = 0,
    candidates: Collection[str] | None = None,
) -> Selection:
    """Chooses units of a report within one budget.

    Args:
        report: The analyzed units.
        num_tensors: Choose that many units (all candidates if there are fewer). This is the default budget, with 100,
            and the only one for a report made with `keep_lowest`, which must have kept as many candidates.
        trainable_fraction: Choose units that together hold at most this fraction, in (0, 1], of the candidates'
            parameters.
        max_condition_number: Choose every candidate whose condition number is at most this. Only with
            `order="lowest"` and `score="condition_number"`; `stratify` then changes nothing.
        score: What units are ranked by, see `condft.selection.scores.score_of`. A zero matrix is last in either order.
        order: `"lowest"` scores first (the method), or the controls `"highest"` and `"random"`.
        stratify: `"module_type"` shares the budget between module types in proportion to their candidates and
            ranks within each; `None` ranks across all of them, as the paper does (arXiv 2506.16289).
        seed: For `order="random"` only. The draw depends on seed and names alone.
        candidates: Names that may be chosen; by default every unit whose role is one of `CANDIDATE_ROLES`.

    Returns:
        The selection. Ties are broken by name, so neither module order nor hash seed matters.

    Raises:
        ValueError: What `check_budget_and_rule` refuses, no candidates, a score that was not measured, figures
            that `keep_lowest` left out, or a budget that selects nothing.

    >>> selection = select_units(report, trainable_fraction=0.1)
    >>> selection.num_parameters <= 0.1 * selection.candidate_parameters
    True
    >>> select_units(report, trainable_fraction=0.001)
    Traceback (most recent call last):
        ...
    ValueError: budget of ... parameters trains nothing: the smallest of 28 candidate units has ...
    """
    check_budget_and_rule(
        num_tensors=num_tensors,
        trainable_fraction=trainable_fraction,
        max_condition_number=max_condition_number,
        score=score,
        order=order,
        stratify=stratify,
    )
    rows, ruled_out = _candidates(report, candidates)
    if order != "random":
        _check_measured(rows, score)
    if max_condition_number is not None:
        stratify = None  # the threshold is the same in every stratum
    ranked = sorted(rows, key=_ranking_key(score, order, seed))
    strata = _strata(ranked, stratify)
    # `keep_lowest` kept the units that this rule can choose. Another rule might choose one without figures.
    if report.screened and not (num_tensors and score == "condition_number" and order == "lowest" and not stratify):
        raise ValueError(
            f"the report was made with keep_lowest and lacks {len(report.screened)} units: it serves num_tensors with "
            "score='condition_number', order='lowest' and stratify=None only. Analyze without keep_lowest."
        )
    if ruled_out and num_tensors is not None:
        _check_enough_kept(report, len(rows), num_tensors)
    if max_condition_number is not None:
        chosen = units_below(ranked, max_condition_number)
    elif trainable_fraction is not None:
        chosen = units_within_fraction(strata, trainable_fraction)
    else:
        chosen = units_by_count(strata, DEFAULT_NUM_TENSORS if num_tensors is None else num_tensors)
    _check_ruled_out(ruled_out, chosen)
    share = 0.0 if order == "random" else shape_share(strata.values(), {row.name for row in chosen}, score)
    return _describe(chosen, rows, score, stratify, share)


def units_of_roles(report: SpectralReport, roles: Collection[Role]) -> set[str]:
    """Names of the units of these roles, including those that `keep_lowest` ruled out."""
    units: list[SpectralRow | ScreenedUnit] = [*report.rows, *report.screened]
    return {unit.name for unit in units if unit.role in roles}


def shape_warning(selection: Selection) -> str | None:
    """A warning for people if shape explains more than half of a selection, with the alternative.

    Args:
        selection: As `select_units` returns it.

    Returns:
        The warning, or None if `selection.shape_share` is at most 1/2.

    >>> from dataclasses import replace
    >>> selection = select_units(report, num_tensors=7)
    >>> print(shape_warning(replace(selection, shape_share=0.2)))
    None
    >>> shape_warning(replace(selection, shape_share=0.9))
    'shape, not learning, explains 90% of this selection: ...'
    """
    if selection.shape_share <= 0.5:
        return None
    within = 'stratify="module_type" (the default) or ' if selection.stratify is None else ""
    return (
        f"shape, not learning, explains {selection.shape_share:.0%} of this selection: random matrices of the same "
        f"shapes would show that much of the gap in {selection.score} between the {len(selection.names)} chosen of "
        f"{selection.num_candidates} weights and the average candidate. The alternative is num_tensors or "
        f'trainable_fraction with {within}score="relative_condition_number".'
    )


def check_budget_and_rule(
    *,
    num_tensors: Any,
    trainable_fraction: Any,
    max_condition_number: Any,
    score: str,
    order: str,
    stratify: str | None,
) -> None:
    """Checks the arguments of `select_units` that can be checked without a report.

    Raises:
        ValueError: Several budgets, one that is no number or out of range, or an unknown score, order or stratum.
    """
    _check_choice("score", score, get_args(Score))
    _check_choice("order", order, get_args(Order))
    check_stratify(stratify)
    budgets = {
        "num_tensors": num_tensors,
        "trainable_fraction": trainable_fraction,
        "max_condition_number": max_condition_number,
    }
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"at most one budget, got {' and '.join(given)}: keep one of them")
    for name in given:
        # Abstract classes, so that numpy's numbers are accepted too.
        value, kind = budgets[name], Integral if name == "num_tensors" else Real
        if not isinstance(value, kind) or isinstance(value, bool):  # True is an Integral to Python
            raise ValueError(f"{name}={value!r} is no {'whole ' if kind is Integral else ''}number")
    if num_tensors is not None and num_tensors < 1:
        raise ValueError(f"num_tensors={num_tensors} selects nothing: it must be at least 1")
    if trainable_fraction is not None and not 0.0 < trainable_fraction <= 1.0:
        raise ValueError(f"trainable_fraction={trainable_fraction} is outside (0, 1]")
    if max_condition_number is not None and (score != "condition_number" or order != "lowest"):
        raise ValueError(
            f"max_condition_number is a threshold on low condition numbers and cannot go with score={score!r}, "
            f"order={order!r}: use num_tensors or trainable_fraction there"
        )
    # Not `< 1.0`, which NaN would pass.
    if max_condition_number is not None and not max_condition_number >= 1.0:
        raise ValueError(
            f"max_condition_number={max_condition_number} selects nothing: a condition number is at least 1"
        )


def check_stratify(stratify: str | None) -> None:
    """Checks that `stratify` is one of `Stratify` or None.

    Raises:
        ValueError: It is neither; the message names the choices.
    """
    _check_choice("stratify", stratify, (*get_args(Stratify), None))


def _check_choice(label: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise ValueError(f"{label}={value!r} is unknown: choose one of {', '.join(map(repr, allowed))}")


def _candidates(
    report: SpectralReport, candidates: Collection[str] | None
) -> tuple[list[SpectralRow], list[ScreenedUnit]]:
    """The rows to choose from, and the candidates without a row because `keep_lowest` ruled them out."""
    known = units_of_roles(report, list(Role))
    if candidates is None:
        names = units_of_roles(report, CANDIDATE_ROLES)
    else:
        names = set(candidates)
        missing = sorted(names - known)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} candidates have no row in the report, the first is {missing[0]!r}"
            )
    if not names:
        raise ValueError(f"none of the report's {len(known)} units is a candidate for training")
    rows = [row for row in report.rows if row.name in names]
    return rows, [unit for unit in report.screened if unit.name in names]


def _check_measured(rows: Sequence[SpectralRow], score: Score) -> None:
    if score == "relative_condition_number":  # made of what every row has
        return
    missing = [row.name for row in rows if getattr(row, score) is None]
    if missing:
        raise ValueError(
            f"score={score!r} was not measured for {len(missing)} of {len(rows)} candidates, the first is "
            f"{missing[0]!r}: {how_to_measure(score)}"
        )


def _check_enough_kept(report: SpectralReport, num_candidates: int, num_tensors: int) -> None:
    if num_tensors > num_candidates:
        # The other rows count towards keep_lowest as well.
        others = len(report.rows) - num_candidates
        raise ValueError(
            f"num_tensors={num_tensors}, but the report was made with keep_lowest and has exact figures of only "
            f"{num_candidates} candidates: analyze with keep_lowest of at least {num_tensors + others}"
        )


def _check_ruled_out(ruled_out: Sequence[ScreenedUnit], chosen: Sequence[SpectralRow]) -> None:
    """The chosen units must lie under every bound by which others were ruled out."""
    worst = max(row.condition_number for row in chosen)
    nearest = min(ruled_out, key=lambda unit: (unit.condition_number_bound, unit.name), default=None)
    if nearest is not None and nearest.condition_number_bound < worst:
        bound = f"{nearest.condition_number_bound:.4g}"
        raise ValueError(
            f"the report was made with keep_lowest and ruled {nearest.name} out at {bound}, below "
            f"the {worst:.4g} that this budget reaches: analyze with a larger keep_lowest"
        )


def _ranking_key(score: Score, order: str, seed: int) -> Callable[[SpectralRow], tuple]:
    if order == "random":
        # A hash of seed and name, not a generator: adding or reordering modules leaves the other draws alone.
        return lambda row: (hashlib.sha256(f"{seed}:{row.name}".encode()).digest(), row.name)
    sign = 1.0 if order == "lowest" else -1.0
    # A zero matrix has no meaningful figure: a stable rank of 0 must not make it the best.
    return lambda row: (row.sigma_max == 0.0, sign * score_of(row, score), row.name)


def _strata(ranked: Sequence[SpectralRow], stratify: str | None) -> dict[str, list[SpectralRow]]:
    strata: dict[str, list[SpectralRow]] = defaultdict(list)
    for row in ranked:
        strata[row.module_type if stratify else ""].append(row)
    return dict(sorted(strata.items()))


def _describe(
    chosen: Sequence[SpectralRow], rows: Sequence[SpectralRow], score: Score, stratify: Stratify | None, share: float
) -> Selection:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        counts[row.module_type][1] += 1
    for row in chosen:
        counts[row.module_type][0] += 1
    return Selection(
        names=tuple(sorted(row.name for row in chosen)),
        num_parameters=sum(row.num_parameters for row in chosen),
        num_candidates=len(rows),
        candidate_parameters=sum(row.num_parameters for row in rows),
        by_module_type={name: (count[0], count[1]) for name, count in sorted(counts.items())},
        score=score,
        stratify=stratify,
        shape_share=share,
    )
