"""Everything that an adapter trains is found once, with its base values, slices and place in the base model."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from condft import CondFTConfig
from condft.tuner import export_delta
from condft.tuner.export.updates import Update, iter_updates
from condft.tuner.layers.slices import Slices
from tests.helpers.models.adapters import EVERYTHING
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe

STACK = "model.layers.0.mlp.experts.down_proj"


def test_every_trained_parameter_once_with_the_base_s_values(adapter: Any, tiny_llama: Any) -> None:
    base = dict(tiny_llama(tied=False).named_parameters())
    model = adapter(base=tiny_llama(tied=False), **EVERYTHING)
    updates = list(iter_updates(model))
    assert sorted(update.name for update in updates) == sorted(
        [*model.peft_config["default"].target_units, "lm_head.weight", "model.embed_tokens.weight"]
    )
    assert all(torch.equal(update.base, base[update.name]) for update in updates)
    assert [update.name for update in updates if not update.selected] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    rows = next(update for update in updates if update.name == "model.embed_tokens.weight")
    assert rows.slices == Slices(0, ((33, 34), (80, 81)))
    assert rows.trained.shape == (2, 32)


def test_experts_have_slices_and_the_difference_is_zero_elsewhere(token_ids: Tensor) -> None:
    config = CondFTConfig(target_units=[f"{STACK}[2]", f"{STACK}[1]"], init_weights=False)
    (update,) = iter_updates(get_peft_model(tiny_moe(), config))
    assert update.slices == Slices(0, ((1, 3),))
    assert update.difference().shape == (2, *update.base.shape[1:])
    dense = update.dense_difference()
    assert torch.equal(dense[1:3], update.difference())
    assert not dense[0].any()
    assert not dense[3].any()


@pytest.mark.parametrize(
    ("base", "trained", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_the_difference_is_computed_in_fp32_or_wider(
    base: torch.dtype, trained: torch.dtype, expected: torch.dtype
) -> None:
    one, other = torch.ones(2, 2, dtype=base), torch.full((2, 2), 1.5, dtype=trained)
    difference = Update("up.weight", one, other, None, torch.nn.Linear(2, 2), True).difference()
    assert difference.dtype == expected
    assert torch.equal(difference, torch.full((2, 2), 0.5, dtype=expected))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no adapter 'default' that trains a weight; its adapters are \[\]"):
        list(iter_updates(build_tiny_llama()))


def test_merged_missing_and_tied_are_refused(adapter: Any) -> None:
    model = adapter(num_tensors=3)
    with pytest.raises(ValueError, match=r"no adapter 'other' .* are \['default'\]"):
        export_delta(model, adapter_name="other")
    with pytest.raises(ValueError, match="holds its base already"):
        export_delta(model, base=model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        export_delta(model)
    tied = adapter(num_tensors=3, modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"tied to (model.embed_tokens|lm_head).weight"):
        export_delta(tied)
