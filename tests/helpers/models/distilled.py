"""Self-distillation of a tiny model on fixed random texts, and a model moved away from its base."""

from typing import Any

import torch

from condft.retention import SelfDistillation, SelfDistillationConfig

TEXTS = torch.randint(1, 60, (5, 8), generator=torch.Generator().manual_seed(3))


def distill(model: Any, tokens: torch.Tensor = TEXTS, **settings: Any) -> SelfDistillation:
    return SelfDistillation(SelfDistillationConfig(**settings), tokens, model.disable_adapter, seed=0)


def disturb(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "projector" not in name}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += torch.randn(parameter.shape, generator=generator)
    return trained
