"""The law of random squares, and how much of a ranking stays."""

import numpy as np
import pytest
import torch

from scripts.research.kappa.squares import kept_of_lowest, random_square_spread, square_quantiles, square_ratio


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kept_of_lowest_counts_group_by_group() -> None:
    before = np.concatenate([np.arange(20.0), 100 + np.arange(20.0), [7.0]])
    groups = np.array(["a"] * 20 + ["b"] * 20 + ["lonely"])
    assert kept_of_lowest(before, before, groups) == (4, 4)
    after = before.copy()
    after[[0, 1]] = 50.0  # both lowest of group a leave; group b keeps its own though it is higher
    assert kept_of_lowest(before, after, groups) == (2, 4)
    assert kept_of_lowest(before, -before, groups) == (0, 4)


def test_random_squares_have_uniform_quantiles_and_the_spread_of_their_law() -> None:
    kappa = torch.linalg.cond(gaussian(400, 24, 24).double()).numpy()
    quantiles = square_quantiles(kappa, np.full(400, 24))
    assert np.quantile(quantiles, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.06)
    assert np.log(kappa).std() == pytest.approx(random_square_spread(), rel=0.1)
    assert square_quantiles([square_ratio(0.3) * 7], [7])[0] == pytest.approx(0.3)
