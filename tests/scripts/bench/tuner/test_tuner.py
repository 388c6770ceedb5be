"""The tuner's benchmark: its contestants train the same things, what it counts is what there is, and its table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.bench.tuner.files import layout
from scripts.bench.tuner.memory import peak_allocated
from scripts.bench.tuner.models import Adapted, UnfrozenByHand, entries_of, quarter_of_experts
from scripts.bench.tuner.steps import extra_operations
from scripts.bench.tuner.table import HEADINGS, Figure, figures, markdown
from tests.helpers.tiny_models import tiny_moe

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


def test_the_peak_is_what_lives_at_a_time() -> None:
    def work() -> Tensor:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)
        del second
        return third

    assert peak_allocated(work) == 3_000_000


def test_extra_operations_are_told_by_name() -> None:
    x = torch.ones(3)
    assert extra_operations(lambda: x.exp().sum(), lambda: x.exp().sum()) == {}
    assert extra_operations(lambda: x.exp().exp().view(1, 3), lambda: x.exp().sum()) == {"exp": 1, "sum": -1}


def test_layout_tells_a_wrapper_and_a_dtype() -> None:
    base = tiny_moe()
    adapted: Any = Adapted.by_condft(tiny_moe(), WHOLE).model
    assert layout(adapted.base_model.model) != layout(base)
    assert layout(adapted.merge_and_unload()) == layout(base)
    assert layout(tiny_moe().bfloat16()) != layout(base)


def test_rows_say_whether_targets_are_met() -> None:
    found = {"ratio": 0.61, "low": 0.58, "high": 0.64, "cpu_ratio": 0.59}
    expert = {"work": "mixtral", "implementation": "grouped_mm", "dtype": "bfloat16", "tokens": 512}
    results = {
        "experts": [{**expert, "against_lora": found, "share_of_products": 0.6}],
        "memory": [
            {"work": f"smollm2 {dtype}", "ratio": 1.03, "optimizer_state_exact": True}
            for dtype in ("bfloat16", "float32")
        ],
        "start": {"seconds_beyond_lora": -0.1},
    }
    rows = list(figures(results))
    assert [row.met for row in rows] == [False, False, True, None, True, True]
    assert rows[0].cells()[3:] == ("0.61x", "0.58x-0.64x", "0.59x", "0.60x", "≤ 0.60x", "no")
    assert {len(row.cells()) for row in rows} == {len(HEADINGS)}
    assert markdown(rows).splitlines()[2:] == [
        "| a quarter of the experts, against LoRA `target_parameters` | mixtral, grouped_mm, 512 tokens "
        "|  | **0.61x** (0.60x) | ≤ 0.60x |",
        "| peak memory, against unfrozen with fp32 masters | smollm2 | 1.030x | **1.030x** | ≤ 1.020x |",
        "| optimizer state exactly the selection's | smollm2 | yes | yes |  |",
        "| `get_peft_model`, report cached, beyond LoRA's | SmolLM2 | -0.10 s |  | ≤ 1.00 s |",
    ]


def test_a_target_is_met_at_its_very_figure() -> None:
    assert Figure("step", "any", "float32", 1.03, 1.03).met
    assert not Figure("step", "any", "float32", 1.0301, 1.03).met
    assert Figure("merged", "any", "float32", False).met is False
