"""The analyzer against PEFT's selector, at a size that takes no time."""

import pytest
import torch
from torch import nn

from scripts.bench.analyzer import races


def test_a_race_times_every_contestant_and_compares_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(races.WORK, "small", lambda: races.linears({"a": (24, 16), "b": (16, 16)}))
    found = races.race("small", repeats=2)
    assert {name: len(taken) for name, taken in found["runs"].items()} == dict.fromkeys(
        ["selector", "basic", "all", "first_start", "second_start"], 2
    )
    assert found["same_order"] is True
    assert found["speedup"] == found["seconds"]["selector"] / found["seconds"]["basic"]


def test_the_selector_gives_linears_and_stacks() -> None:
    model = nn.ModuleDict({"experts": races.Experts((2, 6, 4)), "linear": nn.Linear(5, 4, bias=False)})
    assert set(races.selector_kappas(model)) == {"linear.weight", "experts.down_proj"}


def test_weights_are_seeded_by_position() -> None:
    first, again = (races.linears({"a": (4, 3), "b": (4, 3)}) for _ in range(2))
    assert torch.equal(first["a"].weight, again["a"].weight)
    assert not torch.equal(first["a"].weight, first["b"].weight)
