"""The work of an analysis shared between the ranks of torch.distributed: one process is the case of one rank."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from condft.analysis.batching import left_after_batches
from condft.analysis.measure import UnitInfo, digest_units
from condft.analysis.threads import thread_map
from condft.files.hashing import tensor_digest
from condft.report import SkippedWeight, SkipReason
from condft.runtime.process_group import ProcessGroup
from condft.weights.unit import Unit, load_ahead

__all__ = ["WorkPlan", "walk_together"]

T = TypeVar("T")


@dataclass(frozen=True)
class WorkPlan:
    """The units of a model and who holds them.

    Attributes:
        ranks: The processes.
        infos: Name -> unit, of every rank's units, in an order that is the same on every rank.
        holders: Name -> ranks that can load it.
        units: Name -> unit, of those that this rank holds.
    """

    ranks: ProcessGroup
    infos: Mapping[str, UnitInfo]
    holders: Mapping[str, Sequence[int]]
    units: Mapping[str, Unit]

    @classmethod
    def between(cls, ranks: ProcessGroup, units: Sequence[Unit]) -> "WorkPlan":
        """Tells every rank what the others hold.

        Raises:
            ValueError: A unit of one name that is not the same on two ranks.
        """
        infos: dict[str, UnitInfo] = {}
        holders: dict[str, list[int]] = {}
        for rank, held in enumerate(ranks.run(lambda: [UnitInfo.of(unit) for unit in units])):
            for info in held:
                if infos.setdefault(info.name, info) != info:
                    raise ValueError(
                        f"the ranks hold different models: {info.name} is {infos[info.name]} on rank "
                        f"{holders[info.name][0]} and {info} on rank {rank}. Pass shared=False to analyze each by "
                        "itself."
                    )
                holders.setdefault(info.name, []).append(rank)
        return cls(ranks, infos, holders, {unit.name: unit for unit in units})

    def map(
        self,
        names: Sequence[str],
        cost: Callable[[UnitInfo], float],
        work: Callable[[Unit], T],
        in_bulk: Callable[[Sequence[Unit]], dict[str, T]] | None = None,
        together: Callable[[Sequence[Unit]], list[T]] | None = None,
        done: Callable[[Unit, T], None] = lambda unit, result: None,
    ) -> dict[str, T]:
        """Does the work of every named unit on one rank each and returns all results by name on every rank.

        Args:
            names: The same on every rank.
            cost: What balances the ranks.
            work: The work of one unit, whose values are in memory; of small ones in threads, see `thread_map`.
            in_bulk: The same of many units at once, whose values it loads itself.
            together: The same of units of one shape in memory, see `condft.analysis.batching`.
            done: Called with every unit of this rank and its result, in the caller's thread. Not after `in_bulk`.

        Raises:
            Exception: As `ProcessGroup.run`.
        """
        rounds, owner = self.assign(names, cost)
        here = [name for name in self.infos if owner.get(name) == self.ranks.rank]
        plain = [self.units[name] for name in here if not self.infos[name].collective]

        def own() -> dict[str, T]:
            gathered = self._gathered(rounds, owner)
            results: dict[str, T] = {}

            def note(unit: Unit, result: T) -> None:
                results[unit.name] = result
                done(unit, result)

            def do(units: Iterator[Unit]) -> None:
                alone = units if together is None else left_after_batches(units, together, note)
                thread_map(alone, work, note)

            try:
                do(gathered)
            except Exception:
                for _ in gathered:
                    pass  # the other ranks wait for this one in the gathers that follow
                raise
            if in_bulk is not None:
                return results | in_bulk(plain)
            do(load_ahead(plain))
            return results

        return {name: result for part in self.ranks.run(own) for name, result in part.items()}

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """The digest of every named unit, on every rank. Arguments and errors as of `map`."""
        return self.map(names, lambda info: info.num_parameters, lambda unit: tensor_digest(unit.tensor), digest_units)

    def assign(
        self, names: Sequence[str], cost: Callable[[UnitInfo], float]
    ) -> tuple[list[list[list[str]]], dict[str, int]]:
        """Who does what: longest processing time first (Graham 1969), each unit to the least loaded of its holders.

        Returns:
            Rounds of weights that all ranks gather together, as the units of each weight, and unit -> rank.
        """
        costs = {name: cost(self.infos[name]) for name in names}
        loads = [0.0] * self.ranks.size
        owner: dict[str, int] = {}

        def give(name: str, taken: Sequence[int]) -> int:
            rank = min(self.holders[name], key=lambda rank: (taken[rank], loads[rank], rank))
            loads[rank] += costs[name]
            owner[name] = rank
            return rank

        weights: dict[str, list[str]] = {}
        for name in names:
            if self.infos[name].collective:
                weights.setdefault(name.partition("[")[0], []).append(name)
        # Weights of similar cost are gathered together, one for each rank: then all work and nobody waits for long.
        ordered = sorted(weights.values(), key=lambda units: (-sum(costs[unit] for unit in units), units[0]))
        rounds = [ordered[start : start + len(loads)] for start in range(0, len(ordered), len(loads))]
        for together in rounds:
            taken = [0] * len(loads)
            for name in sorted((name for units in together for name in units), key=lambda name: (-costs[name], name)):
                taken[give(name, taken)] += 1
        plain = (name for name in names if not self.infos[name].collective)
        # Those that few can do go first: the others even the loads out.
        for name in sorted(plain, key=lambda name: (len(self.holders[name]), -costs[name], name)):
            give(name, [0] * len(loads))
        return rounds, owner

    def _gathered(self, rounds: list[list[list[str]]], owner: Mapping[str, int]) -> Iterator[Unit]:
        """Takes part in all gathers, in the order of the rounds, and yields this rank's own units after each round."""
        for together in rounds:
            own: list[Unit] = []
            for names in together:
                units = [self.units[name] for name in names if name in self.units]
                if units and units[0].deferred is not None:
                    values = units[0].deferred.read()
                    own += [unit.with_values(values) for unit in units if owner[unit.name] == self.ranks.rank]
                    del values
            while own:
                yield own.pop(0)


def walk_together(
    ranks: ProcessGroup, walk: Callable[[], Iterable[Unit | SkippedWeight]]
) -> tuple[WorkPlan, list[SkippedWeight]]:
    """The units of all ranks, and the weights that are none on any."""
    units: list[Unit] = []

    def own() -> list[SkippedWeight]:
        skipped: list[SkippedWeight] = []
        for item in walk():
            if isinstance(item, Unit):
                units.append(item)
            else:
                skipped.append(item)
        return skipped

    by_rank = ranks.run(own)
    shares = WorkPlan.between(ranks, units)
    # A weight that has no values on one rank may have them on another.
    meta = [{skip.name for skip in skips if skip.reason is SkipReason.META_DEVICE} for skips in by_rank]
    nowhere = set.intersection(*meta)
    merged: dict[str, SkippedWeight] = {}
    for skips in by_rank:
        for skip in skips:
            if skip.reason is not SkipReason.META_DEVICE or skip.name in nowhere:
                merged.setdefault(skip.name, skip)
    return shares, list(merged.values())
