"""`Slices` read, replace and write what indexing would."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condft.tuner.layers.slices import Slices


@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 1))
def test_slices_take_splice_and_write(indices: set[int], dim: int) -> None:
    whole = torch.arange(12 * 12.0).reshape(12, 12)
    slices = Slices.joined(dim, [(i, i + 1) for i in indices])
    chosen = torch.tensor(sorted(indices))
    assert slices.indices == tuple(sorted(indices))
    assert torch.equal(slices.take(whole), whole.index_select(dim, chosen))
    values = -slices.take(whole)
    spliced = slices.splice(whole, values)
    assert torch.equal(spliced, whole.index_copy(dim, chosen, values))
    written = whole.clone()
    slices.write(written, values)
    assert torch.equal(written, spliced)
    assert torch.equal(slices.transposed().splice(whole.t(), values.t()), spliced.t())


def test_slices_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the ranges \(0, 3\) and \(2, 4\) of dimension 0 overlap"):
        Slices.joined(0, [(2, 4), (0, 3)])


@given(st.sets(st.integers(0, 20), min_size=1))
def test_runs_are_ascending_and_apart(indices: set[int]) -> None:
    runs = Slices.joined(0, [(i, i + 1) for i in sorted(indices, reverse=True)]).runs
    assert all(stop < start for (_, stop), (start, _) in pairwise(runs))
    assert sum(stop - start for start, stop in runs) == len(indices)


def test_the_gradient_of_a_splice_reaches_the_slices_alone() -> None:
    values = torch.randn(2, 3, requires_grad=True)
    spliced = Slices(0, ((1, 3),)).splice(torch.zeros(4, 3), values)
    weight = torch.arange(12.0).reshape(4, 3)
    (spliced * weight).sum().backward()
    assert torch.equal(values.grad, weight[1:3])


def test_take_along_another_dimension() -> None:
    outputs = torch.arange(10.0).reshape(2, 5)
    assert torch.equal(Slices(0, ((1, 2), (3, 5))).take(outputs, dim=1), outputs[:, [1, 3, 4]])
