"""Counted traffic and flops."""

import pytest
import torch

from scripts.bench.analyzer.limit import CountedWork, distance_to_limit


def test_large_operations_count_their_bytes_and_products_their_flops() -> None:
    left, right = torch.ones(30, 20), torch.ones(20, 10)
    with CountedWork(large=30 * 20) as counted:
        left @ right
        left + 1
        right + 1  # too small to be a pass
    assert counted.flops == 2 * 30 * 20 * 10
    assert counted.bytes == 4 * (30 * 20 + 2 * 30 * 20)


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda a: torch.linalg.cholesky_ex(a), 12**3 / 3),
        (lambda a: torch.linalg.qr(a), 2 * 12**3 - 2 / 3 * 12**3),
        (lambda a: torch.linalg.lu_factor_ex(a), 2 / 3 * 12**3),
        (lambda a: torch.linalg.svdvals(a), 8 / 3 * 12**3),
    ],
)
def test_factorizations_count_their_leading_terms(work, flops: float) -> None:
    matrix = torch.eye(12) * 2
    with CountedWork(large=1) as counted:
        work(matrix)
    assert counted.flops == pytest.approx(flops)


def test_the_distance_is_seconds_over_those_at_the_machines_rates() -> None:
    a = torch.ones(10, 10)
    rates = {"bytes_per_second": 100.0, "fp64_flops_per_second": 1000.0}
    found = distance_to_limit(lambda: a @ a, 100, rates, seconds=28.0)
    assert found["limit_seconds"] == 3 * 400 / 100 + 2000 / 1000
    assert found["ratio"] == 2.0
