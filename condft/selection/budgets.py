"""The three budgets: which units of a ranking each of them chooses. Pure Python, no torch."""

from collections.abc import Iterable
from fractions import Fraction

from condft.report import SpectralRow

__all__ = ["units_below", "units_by_count", "units_within_fraction"]


def units_below(ranked: Iterable[SpectralRow], limit: float) -> list[SpectralRow]:
    """The units whose condition number is at most `limit`.

    Raises:
        ValueError: There is none; the message names the lowest.
    """
    ranked = list(ranked)
    chosen = [row for row in ranked if row.condition_number <= limit]
    if not chosen:
        best = ranked[0]
        raise ValueError(
            f"max_condition_number={limit:g} selects nothing: the lowest of {len(ranked)} candidates is "
            f"{best.condition_number:.4g} ({best.name}). Raise it, or widen target_modules."
        )
    return chosen


def units_by_count(strata: dict[str, list[SpectralRow]], count: int) -> list[SpectralRow]:
    """Shares `count` units between strata in proportion to their sizes, by largest remainders (Hamilton)."""
    total = sum(map(len, strata.values()))
    count = min(count, total)
    # In integers, so that equal shares tie exactly and the tie falls to the name.
    shares = {name: divmod(count * len(rows), total) for name, rows in strata.items()}
    left = count - sum(whole for whole, _ in shares.values())
    extra = sorted(shares, key=lambda name: (-shares[name][1], name))[:left]
    return [row for name, rows in strata.items() for row in rows[: shares[name][0] + (name in extra)]]


def units_within_fraction(strata: dict[str, list[SpectralRow]], fraction: float) -> list[SpectralRow]:
    """Fills each stratum's share of the parameter budget in rank order, then distributes what is left over.

    A stratum takes its ranked units as long as they fit into its share. The unused rest is given to the strata whose
    next unit came nearest to fitting, one unit each, as long as the whole budget holds it.
    """
    rows = [row for members in strata.values() for row in members]
    exact = Fraction(str(fraction))  # 0.7 means seven tenths, so that a share of exactly 21 units is not 20
    # Rounded down, here and for each share: a budget is never exceeded.
    budget = int(exact * sum(row.num_parameters for row in rows))
    chosen: list[SpectralRow] = []
    following: list[tuple[float, str, SpectralRow]] = []
    for name, members in strata.items():
        share = int(exact * sum(row.num_parameters for row in members))
        taken = 0
        for row in members:
            if taken + row.num_parameters > share:
                following.append(((share - taken) / row.num_parameters, name, row))
                break  # in rank order: a smaller unit further down does not replace this one
            taken += row.num_parameters
            chosen.append(row)
    left = budget - sum(row.num_parameters for row in chosen)
    # Ties by the stratum's name, so that the order of modules does not matter.
    for _, _, row in sorted(following, key=lambda entry: (-entry[0], entry[1])):
        if row.num_parameters <= left:
            chosen.append(row)
            left -= row.num_parameters
    if not chosen:
        raise ValueError(
            f"budget of {budget:,} parameters trains nothing: {_what_does_not_fit(strata, budget)}. "
            "Raise trainable_fraction, or widen target_modules."
        )
    return chosen


def _what_does_not_fit(strata: dict[str, list[SpectralRow]], budget: int) -> str:
    sizes = [row.num_parameters for members in strata.values() for row in members]
    if min(sizes) > budget:
        return f"the smallest of {len(sizes)} candidate units has {min(sizes):,}"
    # Units are taken in rank order: a smaller unit of a later rank does not replace one that does not fit.
    firsts = ((members[0].num_parameters, name, members[0].name) for name, members in strata.items())
    size, stratum, first = min(firsts)
    within = f" in {stratum}" if stratum else ""
    return f"{first} ranks first{within} and has {size:,}"
