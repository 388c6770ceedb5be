"""Units whose values come on demand, and the reading ahead of them."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condft.report import Role
from condft.weights import unit as units_module
from condft.weights.unit import DeferredWeight, Unit, load_ahead


class Source:
    """Hands out numbered tensors and notes who asked for which, and how many are still held."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, bool]] = []

    def weight(self, number: int, *, collective: bool = False) -> DeferredWeight:
        def read() -> Tensor:
            self.reads.append((number, threading.current_thread() is threading.main_thread()))
            return torch.full((4, 2), float(number))

        return DeferredWeight((4, 2), torch.float32, read, collective=collective)


def unit(name: str, deferred: DeferredWeight, take: Callable[[Tensor], Tensor] = lambda values: values) -> Unit:
    part = take(deferred.stand_in)
    return Unit(name, part, part, "type", Role.LAYER, deferred, take)


@pytest.fixture
def source() -> Source:
    return Source()


def test_units_come_in_order_with_their_values(source: Source) -> None:
    units = [unit(str(number), source.weight(number)) for number in range(5)]
    assert all(item.tensor.is_meta for item in units)
    loaded = list(load_ahead(units))
    assert [item.name for item in loaded] == ["0", "1", "2", "3", "4"]
    assert [item.matrix[0, 0].item() for item in loaded] == [0, 1, 2, 3, 4]
    assert source.reads == [(number, False) for number in range(5)]  # by another thread


def test_the_next_is_read_while_one_is_in_use(source: Source) -> None:
    started = threading.Event()
    following = DeferredWeight((1, 1), torch.float32, lambda: (started.set(), torch.ones(1, 1))[1])
    for item in load_ahead([unit("0", source.weight(0)), unit("1", following)]):
        if item.name == "0":
            assert started.wait(timeout=10)


def test_large_weights_are_read_when_nothing_else_is_at_work(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ahead of their turn nor together with what comes after them."""
    monkeypatch.setattr(units_module, "_LARGE_BYTES", 32)  # a weight of the source has as many
    large = DeferredWeight((9, 1), torch.float32, lambda: (source.reads.append((1, True)), torch.ones(9, 1))[1])
    read: list[set[int]] = []
    for item in load_ahead([unit("0", source.weight(0)), unit("1", large), unit("2", source.weight(2))]):
        assert float(item.matrix[0, 0]) == float(item.name)
        read.append({number for number, _ in source.reads})
    assert read == [{0}, {0, 1}, {0, 1, 2}]


def test_parts_of_one_weight_cost_one_read(source: Source) -> None:
    weight, other = source.weight(1), source.weight(2)
    parts = [unit(f"h{i}", weight, lambda values, i=i: values[2 * i : 2 * i + 2]) for i in range(2)]
    loaded = list(load_ahead([*parts, unit("other", other)]))
    assert [item.tensor.shape for item in loaded] == [(2, 2), (2, 2), (4, 2)]
    assert [number for number, _ in source.reads] == [1, 2]


def test_collectives_stay_in_the_callers_thread(source: Source) -> None:
    units = [unit("0", source.weight(0, collective=True)), unit("1", source.weight(1))]
    assert [item.collective for item in units] == [True, False]
    list(load_ahead(units))
    assert source.reads == [(0, True), (1, False)]


def test_values_in_memory_are_left_alone() -> None:
    here = Unit("here", torch.ones(2, 2), torch.ones(2, 2), "type", Role.LAYER)
    assert here.load() is here
    assert list(load_ahead([here])) == [here]
    assert list(load_ahead([])) == []


def test_a_failed_read_reaches_the_caller_in_its_turn(source: Source) -> None:
    def fail() -> Tensor:
        raise ValueError("cut off")

    units = [unit("0", source.weight(0)), unit("1", DeferredWeight((2, 2), torch.float32, fail))]
    seen = []
    with pytest.raises(ValueError, match="cut off"):
        for item in load_ahead(units):
            seen.append(item.name)
    assert seen == ["0"]


def test_casting_and_slicing_keep_what_they_come_from() -> None:
    stack = torch.randn(3, 2, 2)
    weight = DeferredWeight((3, 2, 2), torch.float32, lambda: stack, lambda index: stack[index])
    halved = weight.to(torch.bfloat16)
    assert torch.equal(halved.read(), stack.bfloat16())
    assert torch.equal(halved.slice(2).read(), stack[2].bfloat16())
    assert halved.slice(2).shape == (2, 2)
    assert weight.to(torch.float32) is weight
