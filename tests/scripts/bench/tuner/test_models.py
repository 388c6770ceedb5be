"""The contestants train the same weights by the same steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.bench.tuner.models import Adapted, UnfrozenByHand, entries_of, quarter_of_experts
from tests.helpers.models.tiny_models import tiny_moe

WHOLE = ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"]


def slices_of(base: Any) -> list[str]:
    return [*quarter_of_experts(base), *WHOLE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units_of", [slices_of, lambda base: WHOLE])
def test_unfrozen_by_hand_is_the_same_training(
    token_ids: Tensor, dtype: torch.dtype, units_of: Callable[[Any], list[str]]
) -> None:
    base = tiny_moe().to(dtype)
    units = units_of(base)
    ours, by_hand = Adapted.by_condft(base, units), UnfrozenByHand(base, units)
    losses = [[each.step(token_ids) for _ in range(3)] for each in (ours, by_hand)]
    assert losses[0] == losses[1]
    assert ours.optimizer_entries() == by_hand.optimizer_entries() == 2 * entries_of(base, units)
    merged = dict(ours.model.merge_and_unload().named_parameters())
    for name, parameter in by_hand.model.named_parameters():
        assert torch.equal(merged[name], parameter), name


def test_a_quarter_of_the_experts_is_both_matrices_of_them() -> None:
    base = tiny_moe("olmoe")
    units = quarter_of_experts(base)
    assert len(set(units)) == len(units) == 2 * 2 * 2  # of 8 experts 2, two layers, two matrices
    assert quarter_of_experts(base) == units
    assert entries_of(base, units) * 4 == sum(p.numel() for n, p in base.named_parameters() if ".experts." in n)


def test_lora_adapts_every_expert(token_ids: Tensor) -> None:
    lora = Adapted.by_lora_on_experts(tiny_moe())
    assert torch.isfinite(torch.tensor(lora.step(token_ids)))
    trained = {name for name, parameter in lora.model.named_parameters() if parameter.grad is not None}
    assert not trained  # the step has cleared them
    assert sum(p.requires_grad for p in lora.model.parameters()) == 2 * 2 * 2  # A and B, two stacks, two layers
