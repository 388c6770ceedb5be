"""Updates confined to minor singular directions, of single weights and of experts in fused stacks."""

import pytest
import torch
from peft import get_peft_model

from condft import CondFTConfig
from scripts.research.study.minor import confine_to_minor_directions
from tests.helpers.models.tiny_llama import build_tiny_llama
from tests.helpers.models.tiny_models import tiny_moe

MODELS = {
    "llama": (build_tiny_llama, ["model.layers.0.mlp.up_proj.weight"]),
    "mixtral": (
        tiny_moe,
        [f"model.layers.0.mlp.experts.{stack}[{i}]" for stack in ("gate_up_proj", "down_proj") for i in (1, 3)],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_confined_updates_leave_the_leading_directions_alone(kind: str) -> None:
    build, units = MODELS[kind]
    model = get_peft_model(build(), CondFTConfig(target_units=units))
    before = {name: copy.detach().clone() for name, copy in model.named_parameters() if copy.requires_grad}
    copies = {name: copy for name, copy in model.named_parameters() if copy.requires_grad}
    confine = confine_to_minor_directions(model)
    optimizer = torch.optim.AdamW(copies.values(), lr=1e-2)
    for step in range(3):
        model(input_ids=torch.arange(12)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        confine({"step": step + 1})
    assert len(copies) == len({unit.partition("[")[0] for unit in units})
    for name, copy in copies.items():
        update = copy.detach() - before[name]
        left, _, right = torch.linalg.svd(before[name], full_matrices=False)  # of each expert for itself
        half = min(update.shape[-2:]) // 2
        norms = update.norm(dim=(-2, -1))
        assert (norms > 0.1).all()
        assert ((left[..., :half].mT @ update).norm(dim=(-2, -1)) < 1e-4 * norms).all()
        assert ((update @ right[..., :half, :].mT).norm(dim=(-2, -1)) < 1e-4 * norms).all()
