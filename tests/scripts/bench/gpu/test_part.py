"""Times and peaks on the CPU."""

import torch

from scripts.bench.gpu.part import Place, peak_bytes, synchronized, timed

CPU = Place("cpu", small=True)


def test_the_result_and_the_seconds_are_those_of_the_work() -> None:
    calls: list[int] = []
    seconds, result = timed(CPU, lambda: calls.append(1) or len(calls), repeats=3)
    assert (result, len(calls)) == (4, 4)  # one call before the clock starts
    assert seconds >= 0
    assert synchronized(CPU, lambda: 7) == 7


def test_a_peak_is_what_is_alive_at_one_time() -> None:
    assert peak_bytes(CPU, lambda: torch.empty(1_000_000, dtype=torch.uint8)) == 1_000_000


def test_tiny_models_train_in_fp32() -> None:
    assert (CPU.dtype, Place("cuda").dtype) == (torch.float32, torch.bfloat16)
