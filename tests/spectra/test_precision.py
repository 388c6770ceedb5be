"""Figures do not depend on what the caller set for himself: precision, autocast, device; and that is as before."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from condft import analyze
from condft.spectra import batched_facts, code_rounding_error, condition_number_bound, spectral_facts
from condft.spectra.noise import _code_rounding_error
from condft.spectra.precision import fp32_products
from tests.helpers.models.tiny_checkpoints import build


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


AMBIENT = [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")]
# One a route: svd, eigen, gram, cholesky of a square, lu.
SHAPES = [(40, 12), (300, 100), (1500, 600), (300, 300), (1100, 1100)]


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("shape", SHAPES)
def test_facts_under_autocast_and_another_default_device_are_the_same(ambient, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    facts, bound = spectral_facts(matrix, measures="all"), condition_number_bound(matrix)
    with ambient():
        assert spectral_facts(matrix, measures="all") == facts
        assert condition_number_bound(matrix) == bound


@pytest.mark.parametrize("ambient", AMBIENT)
def test_batches_under_autocast_and_another_default_device_are_the_same(ambient):
    matrix = torch.randn(272, 272, generator=torch.Generator().manual_seed(0))
    facts = batched_facts([matrix])
    with ambient():
        assert batched_facts([matrix]) == facts


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("keep_lowest", [None, 1])
def test_reports_under_autocast_and_another_default_device_are_the_same(ambient, keep_lowest, tmp_path):
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    report = analyze(tmp_path, keep_lowest=keep_lowest, progress=False)
    with ambient():
        assert analyze(tmp_path, keep_lowest=keep_lowest, progress=False) == report


@pytest.mark.parametrize("ambient", AMBIENT)
def test_noise_under_autocast_and_another_default_device_is_the_same(ambient):
    codes = torch.linspace(-1, 1, 15)
    error = code_rounding_error(codes, 32)
    _code_rounding_error.cache_clear()
    with ambient():
        assert code_rounding_error(codes, 32) == error


def test_autocast_is_as_it_was_afterwards():
    with torch.autocast("cpu", torch.bfloat16):
        condition_number_bound(torch.eye(50))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
