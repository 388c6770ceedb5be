"""Trainable parameters leave the meta device; accelerate alone cannot distinguish them there.

tests/integration/tuner/test_meta_processes.py trains such a model in two processes.
"""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from condft.tuner.patches import meta_parameters
from condft.tuner.patches.meta_parameters import materialize


class Two:
    """As `ProcessGroup` in one of two processes."""

    size = 2


def build() -> nn.Module:
    """Two linear layers, the first frozen, and a third that shares the second's weight."""
    with torch.device("meta"):
        model = nn.ModuleDict({"frozen": nn.Linear(3, 2), "trained": nn.Linear(3, 2), "tied": nn.Linear(3, 2)})
    model["frozen"].requires_grad_(False)
    model["tied"].weight = model["trained"].weight
    return model


def test_accelerate_identifies_parameters_by_an_address_that_meta_tensors_lack() -> None:
    """If this fails, accelerate identifies them in another way, and the patch may be unnecessary."""
    addresses = Accelerator(cpu=True)._get_named_parameters(build(), drop_refs=True)
    assert set(addresses.values()) == {0}
    assert len(addresses) > 1


def test_what_trains_has_memory_and_stays_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_parameters, "ProcessGroup", Two)
    model = build()
    materialize(model)
    assert all(parameter.is_meta for parameter in model["frozen"].parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3
    assert all(parameter.device.type == "cpu" and parameter.isnan().all() for parameter in trained)
    assert model["tied"].weight is model["trained"].weight
    addresses = [parameter.data_ptr() for parameter in trained]
    assert len(set(addresses)) == len(addresses)


def test_a_single_process_keeps_its_meta_tensors() -> None:
    model = build()
    materialize(model)
    assert all(parameter.is_meta for parameter in model.parameters())
