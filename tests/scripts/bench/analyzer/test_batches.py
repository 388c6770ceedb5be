"""Batched calls against threads, at a size that takes no time."""

from scripts.bench.analyzer.batches import in_batches, in_threads, measured, one_by_one
from tests.helpers.models.tiny_llama import build_tiny_llama


def test_all_ways_give_the_same_figures() -> None:
    stack = build_tiny_llama().model.embed_tokens.weight.detach()[:32].reshape(2, 16, -1)
    kappas = [[facts.condition_number for facts in way(stack)] for way in (in_threads, in_batches, one_by_one)]
    for other in kappas[1:]:
        assert all(abs(a / b - 1) < 1e-5 for a, b in zip(sorted(kappas[0]), sorted(other), strict=True))


def test_a_row_says_how_long_each_way_takes() -> None:
    (row,) = measured(1, 2, {"small": (3, 12, 8)})
    assert (row["work"], row["torch_threads"]) == ("small", 1)
    assert set(row["least_ms_each"]) == {"threads", "batches", "one_by_one"}
    assert row["largest_difference"] < 1e-5
