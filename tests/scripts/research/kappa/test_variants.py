"""Small changes of weights: storage formats and noise."""

import pytest
import torch

from scripts.research.kappa.variants import add_noise, int8_round_trip, nf4_round_trip


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_keeps_each_row_within_half_a_step_and_its_largest_entry_exactly() -> None:
    weight = gaussian(5, 3, 8) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 0.0])[:, None, None]
    rounded = int8_round_trip(weight)
    step = weight.flatten(1).abs().amax(1) / 127
    assert rounded.shape == weight.shape
    assert ((rounded - weight).flatten(1).abs() <= 0.5001 * step[:, None]).all()
    torch.testing.assert_close(rounded.flatten(1).abs().amax(1), 127 * step)
    assert (int8_round_trip(rounded) - rounded).abs().max() <= 1e-3 * step.max()
    assert len(rounded[1].unique()) > 16  # more levels than nf4 has


def test_nf4_takes_the_nearest_of_sixteen_levels_in_each_block() -> None:
    weight = gaussian(7, 30)  # blocks of 64 cross the rows, the last one is short
    rounded = nf4_round_trip(weight)
    flat, found = weight.flatten(), rounded.flatten()
    from scripts.research.kappa.variants import _NF4_CODES

    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        levels = torch.tensor(_NF4_CODES) * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        torch.testing.assert_close((found[start : start + 64] - block).abs(), nearest, atol=1e-6, rtol=0)
    assert not nf4_round_trip(torch.zeros(2, 3)).any()


def test_the_round_trips_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(64, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(nf4_round_trip(weight), functional.dequantize_4bit(packed, state), atol=1e-5, rtol=1e-5)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = functional.int8_vectorwise_dequant(codes, scales)
    difference = (int8_round_trip(weight.half()) - theirs.float()).abs()
    assert (difference > 1e-3).float().mean() < 1e-3  # theirs scales in fp16: now and then a level's edge lies apart
    assert (difference <= 1.01 * scales[:, None] / 127).all()


def test_noise_has_the_norm_asked_for_and_belongs_to_the_name() -> None:
    weight = gaussian(12, 9)
    noisy = add_noise("a", weight, relative_norm=0.03)
    assert (noisy - weight).norm() / weight.norm() == pytest.approx(0.03, rel=1e-4)
    assert torch.equal(noisy, add_noise("a", weight, relative_norm=0.03))
    assert not torch.equal(noisy, add_noise("b", weight, relative_norm=0.03))
