"""The work of an analysis shared between processes: who holds which unit, who does its work, and the results on all.

`share_units` walks on every process and makes a `WorkPlan`; the plan's methods do the work. A single process is the
case of a group of one, so no caller needs two paths.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from condft.analysis.batching import process_batches
from condft.analysis.measure import UnitInfo, digest_units
from condft.analysis.threads import thread_map
from condft.files.hashing import tensor_digest
from condft.report import SkippedWeight, SkipReason
from condft.runtime.process_group import ProcessGroup
from condft.weights.unit import Unit, load_ahead

__all__ = ["WorkPlan", "share_units"]

T = TypeVar("T")


@dataclass(frozen=True)
class WorkPlan:
    """The units of a model, on which processes they are, and how their work is shared.

    Attributes:
        group: The processes.
        infos: Name -> unit, of the units of every process, in an order that is the same on every process.
        holders: Name -> ranks of the processes that can load it.
        units: Name -> unit, of those that this process holds.
        skipped: Weights that are a unit on no process.
    """

    group: ProcessGroup
    infos: Mapping[str, UnitInfo]
    holders: Mapping[str, Sequence[int]]
    units: Mapping[str, Unit]
    skipped: Sequence[SkippedWeight] = ()

    def map(
        self,
        costs: Mapping[str, float],
        work: Callable[[Unit], T],
        *,
        bulk_work: Callable[[Sequence[Unit]], dict[str, T]] | None = None,
        batch_work: Callable[[Sequence[Unit]], list[T]] | None = None,
        on_result: Callable[[Unit, T], None] = lambda unit, result: None,
    ) -> dict[str, T]:
        """Does the work of every named unit once, on one of the processes, and returns all results on every process.

        Args:
            costs: Name of each unit -> how long its work takes, in any measure: it balances the processes. The same
                on every process.
            work: The work of one unit, whose values are in memory. Small units run in threads, see `thread_map`.
            bulk_work: The work of many units at once; it loads their values itself.
            batch_work: The work of units of one shape in memory, see `condft.analysis.batching`.
            on_result: Called with every unit of this process and its result, in the caller's thread. Not called after
                `bulk_work`.

        Returns:
            Name -> result.

        Raises:
            Exception: As `ProcessGroup.run`.
        """
        rounds, owner = self.assign(costs)  # each process computes the same assignment, so nothing is sent
        own = [self.units[name] for name in self.infos if owner.get(name) == self.group.rank]
        local = [unit for unit in own if not self.infos[unit.name].collective]

        def own_results() -> dict[str, T]:
            gathered = self._gathered(rounds, owner)
            results: dict[str, T] = {}

            def note(unit: Unit, result: T) -> None:
                results[unit.name] = result
                on_result(unit, result)

            def process(units: Iterator[Unit]) -> None:
                single = units if batch_work is None else process_batches(units, batch_work, note)
                thread_map(single, work, note)

            try:
                # Before the local units: the other processes wait in the same gathers.
                process(gathered)
            except Exception:
                for _ in gathered:
                    pass  # the other processes wait for this one in the gathers that follow
                raise
            if bulk_work is not None:
                # The gathered units are done: `bulk_work` must not load what all processes load together.
                return results | bulk_work(local)
            process(load_ahead(local))
            return results

        return {name: result for part in self.group.run(own_results) for name, result in part.items()}

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> digest of every named unit, on every process. Arguments and errors as of `map`."""
        sizes = {name: self.infos[name].num_parameters for name in names}
        return self.map(sizes, lambda unit: tensor_digest(unit.tensor), bulk_work=digest_units)

    def assign(self, costs: Mapping[str, float]) -> tuple[list[list[list[str]]], dict[str, int]]:
        """Which process does the work of which unit.

        Longest processing time first (Graham, SIAM J. Appl. Math. 17, 1969): units in falling order of cost, each to
        the least loaded of the processes that hold it.

        Returns:
            Rounds of weights that all processes gather together, each weight as the names of its units; and unit ->
            rank.
        """
        loads = [0.0] * self.group.size
        owner: dict[str, int] = {}

        def give(name: str, taken: Sequence[int]) -> int:
            # The fewest units of this round first, so that every process has work between two gathers.
            rank = min(self.holders[name], key=lambda rank: (taken[rank], loads[rank], rank))
            loads[rank] += costs[name]
            owner[name] = rank
            return rank

        weights: dict[str, list[str]] = {}
        for name in costs:
            if self.infos[name].collective:
                # Units of one weight (`name[3]`, `name[h3]`) come from one gather.
                weights.setdefault(name.partition("[")[0], []).append(name)
        # A round gathers as many weights as there are processes, of similar cost. Then each process has work, and none
        # waits long for the others before the next round.
        ordered = sorted(weights.values(), key=lambda units: (-sum(costs[unit] for unit in units), units[0]))
        rounds = [ordered[start : start + len(loads)] for start in range(0, len(ordered), len(loads))]
        for weights_of_round in rounds:
            taken = [0] * len(loads)
            units = (name for units in weights_of_round for name in units)
            for name in sorted(units, key=lambda name: (-costs[name], name)):
                taken[give(name, taken)] += 1
        local = (name for name in costs if not self.infos[name].collective)
        # Units that few processes hold are given first. The others can go anywhere, so they even out the loads.
        for name in sorted(local, key=lambda name: (len(self.holders[name]), -costs[name], name)):
            give(name, [0] * len(loads))
        return rounds, owner

    def own_share(self, costs: Mapping[str, float]) -> float:
        """This process's part of the cost of the named units, between 0 and 1."""
        _, owner = self.assign(costs)
        total = sum(costs.values())
        return sum(cost for name, cost in costs.items() if owner[name] == self.group.rank) / total if total else 0.0

    def _gathered(self, rounds: list[list[list[str]]], owner: Mapping[str, int]) -> Iterator[Unit]:
        """Takes part in all gathers, in the order of the rounds; yields this process's own units after each round."""
        for weights in rounds:
            own: list[Unit] = []
            for names in weights:
                units = [self.units[name] for name in names if name in self.units]
                # Also if this process owns none of the units: the read is a collective of all that hold the weight.
                if units and units[0].deferred is not None:
                    values = units[0].deferred.read()
                    own += [unit.with_values(values) for unit in units if owner[unit.name] == self.group.rank]
                    del values  # else it would stay in memory during the work, next to the unit's part of it
            while own:
                yield own.pop(0)  # popped, so that its values go when the work on it ends


def share_units(walk: Iterable[Unit | SkippedWeight], group: ProcessGroup) -> WorkPlan:
    """Walks on every process and combines what all of them found.

    A weight may be in memory on one process and on the meta device on another (`cpu_ram_efficient_loading` of FSDP
    leaves models like that). It is then a unit, whose work the first one does.

    Args:
        walk: What this process finds. An error while it runs is raised on every process, so a lazy walk is best.
        group: The processes. All of them call this.

    Returns:
        The same plan on every process, except for `units`.

    Raises:
        ValueError: Two processes have a unit of one name that is not the same; or an error of the walk.
    """
    units: list[Unit] = []

    def found_here() -> tuple[list[UnitInfo], list[SkippedWeight]]:
        skipped: list[SkippedWeight] = []
        for item in walk:
            if isinstance(item, Unit):
                units.append(item)
            else:
                skipped.append(item)
        return [UnitInfo.of(unit) for unit in units], skipped  # units hold tensors, which stay on their process

    found = group.run(found_here)
    infos: dict[str, UnitInfo] = {}
    holders: dict[str, list[int]] = {}
    for rank, (held, _) in enumerate(found):
        for info in held:
            if infos.setdefault(info.name, info) != info:
                raise ValueError(
                    f"the processes hold different models: {info.name} is {infos[info.name]} on rank "
                    f"{holders[info.name][0]} and {info} on rank {rank}. Pass shared=False to analyze each by "
                    "itself."
                )
            holders.setdefault(info.name, []).append(rank)
    own_units = {unit.name: unit for unit in units}
    return WorkPlan(group, infos, holders, own_units, _skipped_everywhere([skipped for _, skipped in found]))


def _skipped_everywhere(skipped_by_rank: Sequence[Sequence[SkippedWeight]]) -> list[SkippedWeight]:
    """One entry for each weight; a weight on the meta device counts only if no process has its values."""
    meta = [{skip.name for skip in skips if skip.reason is SkipReason.META_DEVICE} for skips in skipped_by_rank]
    without_values = set.intersection(*meta)
    merged: dict[str, SkippedWeight] = {}
    for skips in skipped_by_rank:
        for skip in skips:
            if skip.reason is not SkipReason.META_DEVICE or skip.name in without_values:
                merged.setdefault(skip.name, skip)
    return list(merged.values())
