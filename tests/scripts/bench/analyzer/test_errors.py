"""Errors of κ against NumPy: planted spectra and a small model."""

import numpy as np
import pytest
import torch
from torch import nn

from scripts.bench.analyzer.errors import error_over_model, planted, planted_error


def test_a_planted_matrix_has_its_spectrum() -> None:
    spectrum = np.geomspace(1e3, 1.0, 8)
    values = np.linalg.svd(planted((12, 8), spectrum, seed=0).numpy(), compute_uv=False)
    np.testing.assert_allclose(values, spectrum, rtol=1e-10)


@pytest.mark.parametrize("kappa", [1.0, 1e4])
def test_the_error_over_planted_spectra_is_small(kappa: float) -> None:
    row = planted_error((48, 32), kappa, torch.float64)
    assert row["error"] < 1e-3
    assert (row["dtype"], row["bounds_below"]) == ("float64", [])


def test_a_lower_bound_is_no_error_and_below_the_truth() -> None:
    row = planted_error((48, 32), 1e12, torch.float64)
    assert row["error"] is None or row["error"] < 1e-2
    assert all(0 <= below < 1 for below in row["bounds_below"])


def test_no_row_promises_too_much_on_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))
    found = error_over_model(model)
    assert (found["weights"], found["past_their_relative_error"]) == (3, 0)
    assert found["largest_error"] < 1e-3
    assert found["places_of_the_order_that_differ"] == 0
