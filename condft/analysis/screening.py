"""`keep_lowest`: which figures are still needed to know the k units of lowest condition number. Pure Python.

Some units have exact condition numbers, others certified lower bounds. A unit whose bound exceeds the k-th lowest
exact figure of its stratum is ruled out. What is left over is measured in the order of the bounds, so few units need a
factorization; and since the outcome is a function of the k lowest alone, it depends neither on the order of work nor
on who did it nor on what was known before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["LAST_STEPS", "Bound", "Screening", "Step"]

# Products spent on a bound: at first on every unit, then on those that the first bound does not rule out.
FIRST_STEPS, LAST_STEPS = 6, 24


@dataclass(frozen=True)
class Bound:
    """A condition number is at least `value`.

    Attributes:
        value: The bound.
        final: Whether more products are not worth their while.
    """

    value: float
    final: bool = False


@dataclass(frozen=True)
class Step:
    """What to find out next.

    Attributes:
        bounds: Unit -> products to spend on a bound.
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
        rtol: Relative error of exact figures and, at most, of what bounds are off by.
    """

    strata: Mapping[str, Sequence[str]]
    keep: int
    rtol: float

    def next_step(self, exact: Mapping[str, float], bounds: Mapping[str, Bound], batch: int) -> Step:
        """What is needed next, nothing if all is known.

        Args:
            exact: Unit -> condition number.
            bounds: Unit -> what is known of the others.
            batch: How many units of a stratum may be looked at together (they are shared between processes).
        """
        step = Step()
        for names in self.strata.values():
            known = [exact[name] for name in names if name in exact]
            limit = math.inf
            if len(known) >= self.keep:
                # By more than both errors: a unit that is ruled out would not rank among the lowest if measured.
                limit = sorted(known)[self.keep - 1] * (1.0 + 3 * self.rtol)
            unknown = [name for name in names if name not in exact]
            unseen = [name for name in unknown if name not in bounds]
            left = [name for name in unknown if name not in bounds or bounds[name].value <= limit]
            step.left.extend(left)
            if len(names) <= self.keep:
                step.exact.extend(left)  # all are kept: no bound can help
            elif unseen:
                step.bounds.update(dict.fromkeys(unseen, FIRST_STEPS))
            else:
                short = self.keep - len(known)
                for name in sorted(left, key=lambda name: (bounds[name].value, name))[: max(short, batch)]:
                    if short > 0 or bounds[name].final:
                        step.exact.append(name)
                    else:
                        step.bounds[name] = LAST_STEPS
        return step

    def outcome(self, exact: Mapping[str, float]) -> tuple[set[str], dict[str, float]]:
        """The kept units, and unit -> bound for all others: the highest condition number kept in their stratum.

        Nothing sharper is told of the others, even where it is known: it would depend on the order of work.
        """
        kept: set[str] = set()
        others: dict[str, float] = {}
        for names in self.strata.values():
            ranked = sorted((exact[name], name) for name in names if name in exact)[: self.keep]
            lowest = {name for _, name in ranked}
            kept |= lowest
            others |= dict.fromkeys((name for name in names if name not in lowest), ranked[-1][0] if ranked else 1.0)
        return kept, others
