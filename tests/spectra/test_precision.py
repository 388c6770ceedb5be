"""Products in fp32 stay in fp32, whatever the caller allowed; and what he allowed is as before."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from condft.spectra import condition_number_bound, spectral_facts
from condft.spectra.precision import fp32_products


def allowed() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


def by_the_old_name() -> None:
    torch.set_float32_matmul_precision("medium")


def by_the_new_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.fixture(params=[by_the_old_name, by_the_new_name])
def allow_less(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    before = allowed()
    yield request.param
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


def test_figures_do_not_depend_on_what_the_caller_allows(allow_less):
    """Without the guard they would be others where the processor has bf16 products (AVX-512 BF16, AMX)."""
    matrix = torch.randn(1100, 768, generator=torch.Generator().manual_seed(0))
    facts, bound = spectral_facts(matrix, measures="all"), condition_number_bound(matrix)
    allow_less()
    lowered = allowed()
    assert lowered == ("tf32", "bf16")
    assert spectral_facts(matrix, measures="all") == facts
    assert condition_number_bound(matrix) == bound
    assert allowed() == lowered


def test_the_setting_comes_back_when_the_last_one_leaves(allow_less):
    allow_less()
    lowered = allowed()
    with pytest.raises(KeyError), fp32_products():
        assert allowed() == ("ieee", "ieee")
        with fp32_products():
            pass
        assert allowed() == ("ieee", "ieee")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: spectral_facts(torch.eye(300))).result()
        assert allowed() == ("ieee", "ieee")
        raise KeyError
    assert allowed() == lowered


def test_nothing_is_set_where_nothing_less_is_allowed():
    before = allowed()
    with fp32_products():
        assert allowed() == before
