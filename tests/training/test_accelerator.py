"""The Accelerator of a run: the configuration counts, not the launcher's defaults."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from condft.training import RunConfig, make_accelerator
from condft.training.accelerator import _set_deepspeed_precision


def test_the_launchers_accumulation_is_not_used(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    config = make_config(gradient_accumulation_steps=4)
    assert make_accelerator(config, cpu=True).gradient_accumulation_steps == 4


def test_precision_and_folder_are_the_runs(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(mixed_precision="bf16")
    accelerator = make_accelerator(config, cpu=True)
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.project_dir == config.output_dir
    assert accelerator.device.type == "cpu"


def test_under_deepspeed_autocast_replaces_its_casting() -> None:
    plugin = SimpleNamespace(deepspeed_config={})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    _set_deepspeed_precision(accelerator, "no")
    assert plugin.deepspeed_config == {}
    _set_deepspeed_precision(accelerator, "bf16")
    assert plugin.deepspeed_config == {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="fp16 is not supported under DeepSpeed; use bf16, no, or another engine"):
        _set_deepspeed_precision(accelerator, "fp16")
