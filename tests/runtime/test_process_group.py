"""A group of one process behaves as a group; what several do is tested in tests/analysis/test_distributed.py."""

import pytest
import torch
from torch import nn

from condft import analyze
from condft.runtime.process_group import ProcessGroup


class _TwoArguments(ValueError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_without_torch_distributed_there_is_one_process() -> None:
    group = ProcessGroup()
    assert (group.size, group.rank, group.first) == (1, 0, True)
    assert (group.run(lambda: 3), group.from_first(lambda: 4)) == ([3], 4)
    group.barrier()
    assert len(analyze(nn.Linear(4, 3), progress=False).rows) == 1


def test_an_error_keeps_its_class_where_it_was_raised() -> None:
    class Local(ValueError):
        pass

    with pytest.raises(Local, match="as it is"):
        ProcessGroup().run(lambda: (_ for _ in ()).throw(Local("as it is")))


class _FakeDistributed:
    """Two processes of which this is rank 1; `sent` holds what it sent, and rank 0 sends `other`."""

    def __init__(self, other: object) -> None:
        self.other = other
        self.sent: list[object] = []

    def all_gather_object(self, values: list[object], value: object) -> None:
        self.sent.append(value)
        values[:] = [self.other, value]


@pytest.fixture
def rank_one(monkeypatch: pytest.MonkeyPatch) -> _FakeDistributed:
    fake = _FakeDistributed("from rank 0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", fake.all_gather_object)
    return fake


def test_results_come_by_rank_and_only_the_first_process_works_for_all(rank_one: _FakeDistributed) -> None:
    group = ProcessGroup()
    assert (group.size, group.rank, group.first) == (2, 1, False)
    assert group.run(lambda: "from rank 1") == ["from rank 0", "from rank 1"]
    assert group.from_first(lambda: pytest.fail("rank 1 must not work")) == "from rank 0"
    assert rank_one.sent == ["from rank 1", None]


def test_a_group_that_is_not_shared_sends_nothing(rank_one: _FakeDistributed) -> None:
    group = ProcessGroup(shared=False)
    assert (group.size, group.rank, group.run(lambda: 5)) == (1, 0, [5])
    assert rank_one.sent == []


@pytest.mark.parametrize(
    ("error", "kind"), [(ValueError("plain"), ValueError), (_TwoArguments("a", "b"), RuntimeError)]
)
def test_what_is_sent_of_an_error_can_be_pickled(rank_one: _FakeDistributed, error: Exception, kind: type) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        ProcessGroup().run(fail)
    (failure,) = rank_one.sent
    sent = failure.error  # type: ignore[attr-defined]
    assert (type(sent), str(sent)) == (kind, str(error))


def test_an_error_of_another_process_is_raised_here(rank_one: _FakeDistributed) -> None:
    def fail() -> None:
        raise ValueError("of rank 0")

    with pytest.raises(ValueError, match="of rank 0"):
        ProcessGroup().run(fail)
    rank_one.other = rank_one.sent[0]
    with pytest.raises(ValueError, match="of rank 0"):
        ProcessGroup().run(lambda: "no error here")
