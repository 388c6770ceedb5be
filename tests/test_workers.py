"""Work side by side: the results of work in turn, in the order of the units, with torch's threads as they were."""

import threading

import pytest
import torch

from condft.units import Unit
from condft.workers import side_by_side


def unit(name: str, rows: int, columns: int) -> Unit:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(len(name)))
    return Unit(name, values, values, "layer", "layer")


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_the_threads_stay_as_they_were(threads):
    units = [unit("u" * (index + 1), 1100 if index == 4 else 20, 1100 if index == 4 else 10) for index in range(12)]
    found = list(side_by_side(units, lambda one: float(one.matrix.sum())))
    assert [one.name for one, _ in found] == [one.name for one in units]
    assert [result for _, result in found] == [float(one.matrix.sum()) for one in units]
    assert torch.get_num_threads() == threads
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [threads]


def test_small_units_run_in_several_threads_and_a_large_one_in_the_caller_s():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = threading.Barrier(2, timeout=20)  # passed only by two threads at once

    def work(one: Unit) -> str:
        if one.name != "large":
            together.wait()
        return threading.current_thread().name

    try:
        units = [unit("a", 8, 8), unit("b", 8, 8), unit("large", 1100, 1100)]
        names = {one.name: name for one, name in side_by_side(units, work)}
    finally:
        torch.set_num_threads(before)
    assert names["large"] == threading.current_thread().name
    assert len({names["a"], names["b"]}) == 2


def test_few_units_are_in_memory_at_a_time(threads):
    asked: list[int] = []

    def units():
        for index in range(30):
            asked.append(index)
            yield unit("u", 5, 5)

    most = 0
    for done, _ in enumerate(side_by_side(units(), lambda one: one.name)):
        most = max(most, len(asked) - done)
    assert most <= threads + 2


def test_an_error_comes_at_its_unit_s_turn(threads):
    def work(one: Unit) -> None:
        if one.name == "bad":
            raise ValueError("no")

    found = []
    with pytest.raises(ValueError, match="no"):
        for one, _ in side_by_side([unit("a", 5, 5), unit("bad", 5, 5), unit("c", 5, 5)], work):
            found.append(one.name)
    assert found == ["a"]
    assert torch.get_num_threads() == threads
