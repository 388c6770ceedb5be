"""The batched Lanczos process gives each matrix the ends that it has alone."""

import pytest
import torch

from condft.spectra.batched.lanczos import run_batch
from condft.spectra.lanczos import BlockLanczos, Ends
from condft.spectra.operators import SymmetricProducts
from tests.helpers.planted import random_matrix, reference


def until(ends: Ends) -> bool:
    return ends.largest_error <= 1e-5


@pytest.fixture(scope="module")
def grams() -> torch.Tensor:
    return torch.stack([matrix.T @ matrix for matrix in (random_matrix((90, 60), seed) for seed in range(4))])


def test_each_matrix_has_the_ends_of_its_own_process(grams: torch.Tensor) -> None:
    found = run_batch(lambda vectors: torch.bmm(vectors, grams), grams, until, [True] * len(grams))
    for seed, (gram, ends) in enumerate(zip(grams, found, strict=True)):
        assert ends is not None
        alone = BlockLanczos(SymmetricProducts(gram)).run(until)
        assert ends.steps == alone.steps
        assert ends.largest == pytest.approx(alone.largest, rel=1e-12)
        assert ends.largest == pytest.approx(reference(random_matrix((90, 60), seed))[0], rel=1e-4)


def test_the_ends_do_not_depend_on_which_others_are_wanted(grams: torch.Tensor) -> None:
    def product(vectors: torch.Tensor) -> torch.Tensor:
        return torch.bmm(vectors, grams)

    everything = run_batch(product, grams, until, [True] * len(grams))
    some = run_batch(product, grams, until, [False, True, False, True])
    assert some == [None, everything[1], None, everything[3]]
    assert run_batch(product, grams, until, [False] * len(grams)) == [None] * len(grams)
