"""Golub-Kahan-Lanczos: Ritz values of the bidiagonal matrix lie within the spectrum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condft.spectra.bounds import iter_ritz_values
from tests.helpers.planted import planted, random_matrix, reference


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 80), st.integers(0, 100))
def test_ritz_values_of_the_bidiagonal_lie_within_the_spectrum(n, more, steps, seed):
    matrix = random_matrix((n + more, n), seed)
    values = reference(matrix)
    found = list(iter_ritz_values(matrix, torch.float64, steps))
    assert found
    for largest, smallest in found:
        assert values[-1] * (1 - 1e-10) <= smallest <= largest <= values[0] * (1 + 1e-10)


def test_looks_get_closer_to_the_ends_and_the_last_one_comes_after_max_steps():
    matrix = random_matrix((120, 80))
    found = list(iter_ritz_values(matrix, torch.float64, 40))
    assert found == list(iter_ritz_values(matrix, torch.float64, 40))
    for (largest, smallest), (later_largest, later_smallest) in itertools.pairwise(found):
        assert later_largest >= largest * (1 - 1e-12)
        assert later_smallest <= smallest * (1 + 1e-12)
    assert len(list(iter_ritz_values(matrix, torch.float64, 1))) == 1


def test_an_invariant_subspace_ends_the_process_with_exact_ends():
    matrix = planted((60, 40), np.repeat([4.0, 1.0], 20))
    largest, smallest = list(iter_ritz_values(matrix, torch.float64, 40))[-1]
    assert (largest, smallest) == pytest.approx((4.0, 1.0), rel=1e-9)
    eye = torch.eye(40, dtype=torch.float64)  # any vector spans an invariant subspace: the first look ends it
    assert list(iter_ritz_values(eye, torch.float64, 40)) == [pytest.approx((1.0, 1.0))]
