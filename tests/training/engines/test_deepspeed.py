"""What DeepSpeed's engines refuse. Training on two processes: see tests/integration/test_engines.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from condft.training.engines.deepspeed import Zero2Engine, Zero3Engine, deepspeed_engine


def accelerator(stage: int) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(("stage", "kind"), [(2, Zero2Engine), (3, Zero3Engine)])
def test_a_zero_stage_has_its_engine(stage: int, kind: type) -> None:
    assert type(deepspeed_engine(accelerator(stage))) is kind


@pytest.mark.parametrize("stage", [0, 1])
def test_other_zero_stages_are_refused(stage: int) -> None:
    with pytest.raises(ValueError, match=f"DeepSpeed with ZeRO stage {stage}: .* Set zero_stage: 2 or 3"):
        deepspeed_engine(accelerator(stage))


def test_zero3_refuses_trained_parameters_of_several_dtypes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    engine = Zero3Engine(accelerator(3))
    with pytest.raises(ValueError, match=r"0.weight is torch.float32 and 1.weight is torch.bfloat16.*use ZeRO-2"):
        engine.check(model)
    model[1].requires_grad_(False)
    engine.check(model)
