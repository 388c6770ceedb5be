"""Steps compared in turns, and the operations that one has and the other has not."""

from typing import Any

import torch
from torch import Tensor

from scripts.bench.tuner.models import Adapted
from scripts.bench.tuner.steps import compared, extra_operations
from tests.helpers.models.tiny_models import tiny_moe

WHOLE = ["model.layers.0.self_attn.v_proj.weight"]


def test_steps_are_compared_with_the_first_contestant(token_ids: Tensor) -> None:
    base: Any = tiny_moe()
    contestants = {"condft": Adapted.by_condft(base, WHOLE), "other": Adapted.by_condft(base, WHOLE)}
    ticks: list[int] = []
    found = compared(contestants, token_ids, 3, 60.0, lambda: ticks.append(1))
    assert len(ticks) == 3
    assert found["against_other"]["rounds"] == 3
    assert found["trained"]["condft"] == found["trained"]["other"] == base.get_parameter(WHOLE[0]).numel()


def test_extra_operations_are_counted_by_name() -> None:
    x = torch.ones(3)
    assert extra_operations(lambda: x.exp().sum(), lambda: x.exp().sum()) == {}
    assert extra_operations(lambda: x.exp().exp().view(1, 3), lambda: x.exp().sum()) == {"exp": 1, "sum": -1}
