"""Training steps and `offload_base`, at small size."""

from scripts.bench.gpu.part import Place
from scripts.bench.gpu.steps import offload_base, training_step

CPU = Place("cpu", small=True)


def test_condft_and_the_same_weights_unfrozen_have_the_same_losses() -> None:
    found = training_step(CPU)
    assert found["problems"] == []
    assert found["losses"]["condft"] == found["losses"]["unfrozen"] != found["losses"]["lora"]
    assert set(found["peak_bytes"]) == {"condft", "unfrozen", "lora"}
    assert all(peak > 0 for peak in found["peak_bytes"].values())
    assert found["against_lora"]["rounds"] == 3


def test_an_offloaded_base_gives_the_same_logits() -> None:
    found = offload_base(CPU)
    assert found["problems"] == []
    assert found["weights"] == 2
