"""Work in threads: results as of work one by one, in the order of the units, with torch's threads as before."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from condft.analysis.threads import thread_map
from condft.weights.unit import Unit


def unit(name: str, rows: int, columns: int) -> Unit:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(len(name)))
    return Unit(name, values, values, "layer", "layer")


def in_new_thread(work: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(params=[1, 2, 5, 17])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_in_the_caller_s_thread(threads):
    units = [unit("u" * (index + 1), 1100 if index == 4 else 20, 1100 if index == 4 else 10) for index in range(12)]
    found: list[tuple[str, float, int]] = []
    thread_map(
        units,
        lambda one: float(one.matrix.sum()),
        lambda one, result: found.append((one.name, result, threading.get_ident())),
    )
    assert found == [(one.name, float(one.matrix.sum()), threading.get_ident()) for one in units]


def test_the_threads_of_others_do_not_change(threads):
    during: list[object] = []
    thread_map(
        [unit("a", 8, 8), unit("b", 8, 8)],
        lambda one: None,
        lambda one, _: during.extend([torch.get_num_threads(), in_new_thread(torch.get_num_threads)]),
    )
    assert during == [threads] * 4
    assert [torch.get_num_threads(), in_new_thread(torch.get_num_threads)] == [threads] * 2


def test_workers_share_the_threads(threads):
    shares: list[int] = []
    units = [unit("u", 8, 8) for _ in range(30)]
    thread_map(units, lambda one: torch.get_num_threads(), lambda one, share: shares.append(share))
    assert set(shares) == {max(1, threads // min(threads, 8))}


def test_small_units_run_in_several_threads_and_a_large_one_in_the_caller_s():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = threading.Barrier(2, timeout=20)  # passed only by two threads at once

    def work(one: Unit) -> str:
        if one.name != "large":
            together.wait()
        return threading.current_thread().name

    names: dict[str, str] = {}
    try:
        units = [unit("a", 8, 8), unit("b", 8, 8), unit("large", 1100, 1100)]
        thread_map(units, work, lambda one, name: names.update({one.name: name}))
    finally:
        torch.set_num_threads(before)
    assert names["large"] == threading.current_thread().name
    assert len({names["a"], names["b"]}) == 2


def test_few_units_are_in_memory_at_a_time(threads):
    asked: list[int] = []
    waiting: list[int] = []

    def units() -> Iterator[Unit]:
        for index in range(30):
            asked.append(index)
            yield unit("u", 5, 5)

    thread_map(units(), lambda one: one.name, lambda one, _: waiting.append(len(asked) - len(waiting)))
    assert max(waiting) <= threads + 2


@pytest.mark.parametrize("where", ["work", "done"])
def test_after_an_error_all_is_as_before(threads, where):
    """Also while the error is kept, with all that its traceback refers to."""
    found: list[str] = []

    def work(one: Unit) -> None:
        if where == "work" and one.name == "bad":
            raise ValueError("no")

    def done(one: Unit, _: None) -> None:
        if where == "done" and one.name == "bad":
            raise ValueError("no")
        found.append(one.name)

    units = [unit("a", 5, 5), unit("bad", 5, 5), unit("c", 5, 5)]
    with pytest.raises(ValueError, match="no") as kept:
        thread_map(units, work, done)
    assert found == ["a"]
    assert torch.get_num_threads() == threads
    thread_map(units[::2], work, done)
    assert found == ["a", "a", "c"]
    assert kept.traceback
