"""`keep_lowest`: which figures are still needed to know the k units of lowest condition number. Pure Python.

Some units have exact condition numbers, others certified lower bounds. A unit whose bound is above the k-th lowest
exact figure of its stratum is ruled out. The others are measured in the order of their bounds, so few units need a
factorization. The outcome depends on the k lowest figures alone. The order of work, the number of processes and what
a cache held before do not change it.

>>> search = Screening({"": ["a", "b", "c"]}, keep=1, rtol=1e-3)
>>> bounds = {"a": Bound(2.0, final=True), "b": Bound(9.0, final=True), "c": Bound(5.0, final=True)}
>>> search.next_step({}, bounds, batch=1).exact
['a']
>>> search.next_step({"a": 3.0}, bounds, batch=1).left  # b and c are above 3: no need to measure them
[]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["LAST_STEPS", "Bound", "Screening", "Step"]

# Matrix-vector products per bound: first a few for every unit, then more for those that the first bound leaves open.
FIRST_STEPS, LAST_STEPS = 6, 24


@dataclass(frozen=True)
class Bound:
    """A condition number is at least `value`.

    Attributes:
        value: The bound.
        final: Whether to measure the unit rather than spend more products on a sharper bound.
    """

    value: float
    final: bool = False


@dataclass(frozen=True)
class Step:
    """What to compute next.

    Attributes:
        bounds: Unit -> products to spend on its bound.
        exact: Units to measure.
        left: All units that are neither measured nor ruled out yet.
    """

    bounds: dict[str, int] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Screening:
    """The search for the `keep` lowest within each stratum.

    Attributes:
        strata: Stratum -> names of its units.
        keep: How many to keep of each.
        rtol: Relative error of exact figures; bounds are off by no more than that.
    """

    strata: Mapping[str, Sequence[str]]
    keep: int
    rtol: float

    def next_step(self, exact: Mapping[str, float], bounds: Mapping[str, Bound], batch: int) -> Step:
        """What is needed next; an empty step if everything is known.

        Args:
            exact: Unit -> condition number.
            bounds: Unit -> bound, of units without an exact figure.
            batch: How many units of a stratum to process at a time; processes share them.
        """
        step = Step()
        for names in self.strata.values():
            known = [exact[name] for name in names if name in exact]
            limit = math.inf
            if len(known) >= self.keep:
                # Above the k-th figure by more than the error of both: only then is it certain that the unit would
                # not be among the lowest if it were measured.
                limit = sorted(known)[self.keep - 1] * (1.0 + 3 * self.rtol)
            unknown = [name for name in names if name not in exact]
            without_bound = [name for name in unknown if name not in bounds]
            left = [name for name in unknown if name not in bounds or bounds[name].value <= limit]
            step.left.extend(left)
            if len(names) <= self.keep:
                step.exact.extend(left)  # all are kept, so no bound can spare a measurement
            elif without_bound:  # bounds of all units first: which unit is measured next depends on them
                step.bounds.update(dict.fromkeys(without_bound, FIRST_STEPS))
            else:
                short = self.keep - len(known)
                for name in sorted(left, key=lambda name: (bounds[name].value, name))[: max(short, batch)]:
                    # With fewer than k figures there is no limit yet that a sharper bound could exceed.
                    if short > 0 or bounds[name].final:
                        step.exact.append(name)
                    else:
                        step.bounds[name] = LAST_STEPS
        return step

    def outcome(self, exact: Mapping[str, float]) -> tuple[set[str], dict[str, float]]:
        """The kept units, and unit -> bound for all others: the highest condition number kept in their stratum.

        A sharper bound may be known for some of the others. It is not reported, because it depends on the order of
        work: the same call would then give different reports.
        """
        kept: set[str] = set()
        others: dict[str, float] = {}
        for names in self.strata.values():
            ranked = sorted((exact[name], name) for name in names if name in exact)[: self.keep]
            lowest = {name for _, name in ranked}
            kept |= lowest
            others |= dict.fromkeys((name for name in names if name not in lowest), ranked[-1][0] if ranked else 1.0)
        return kept, others
