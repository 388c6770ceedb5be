"""Spectral facts of one matrix without its full SVD: checks, scaling, and the facts from the ends of the spectrum.

`condft.spectra.routes` finds the ends.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condft.spectra.bounds import iter_ritz_values
from condft.spectra.operators import iter_row_blocks
from condft.spectra.precision import fp32_products
from condft.spectra.routes import EPS64, Answer, Measures, by_svd, check_measures, find_ends, lanczos_dtype

__all__ = [
    "Measures",
    "NonFiniteError",
    "SpectralFacts",
    "condition_number",
    "condition_number_bound",
    "facts_of",
    "scale_exponent",
    "spectral_facts",
    "tall_of",
]

BOUND_FROM = 1e-2  # relative error from which the condition number is reported as a lower bound


class NonFiniteError(ValueError):
    """A matrix holds NaN or infinity, so it has no spectrum.

    >>> condition_number(torch.tensor([[1.0, float("nan")]]))
    Traceback (most recent call last):
        ...
    condft.spectra.facts.NonFiniteError: the matrix holds NaN or infinity in 1 of 2 entries
    """


@dataclass(frozen=True)
class SpectralFacts:
    r"""Facts of a spectrum with $n = \min(m, k)$ singular values.

    Attributes:
        sigma_max: Largest singular value.
        sigma_min: Smallest of the n; 0 for a numerically rank-deficient matrix.
        condition_number: sigma_max / sigma_min in `[1, inf]`; `inf` if rank-deficient or zero.
        frobenius_norm: $\sqrt{\sum \sigma_i^2}$.
        stable_rank: $\sum \sigma_i^2 / \sigma_1^2$ in `[1, n]` (Rudelson & Vershynin 2007); 0 for a zero matrix.
        log_volume: $\sum \log \sigma_i$ in nats, the log of the factor by which the map scales n-dimensional
            volume, to 1e-6 a dimension; `-inf` if rank-deficient; None if not measured.
        entropy_deficit: $\frac n2 \log(\frac1n \sum \sigma_i^2) - \sum \log \sigma_i \ge 0$ in nats: how much
            less entropy the map passes on than the best-conditioned one of the same Frobenius norm (AM-GM
            inequality on $\sigma_i^2$); 0 only for equal singular values, `inf` if rank-deficient; None if not
            measured.
        relative_error: Upper bound of the relative error of `condition_number`. The routes `gram`, `cholesky` and `qr`
            prove it by inertia; for `eigen` and `svd` it is the rounding of the decomposition; for `lu`, and for `qr`
            past 1e6, it is an estimate from several start vectors.
        method: The route that found the ends (see `condft.spectra.routes`).
        spectrum: All singular values in descending order, rounded to fp32; None if not asked for.

    >>> facts = spectral_facts(torch.diag(torch.tensor([4.0, 2.0, 1.0])), measures="all")
    >>> facts.sigma_max, facts.sigma_min, facts.condition_number, facts.stable_rank
    (4.0, 1.0, 4.0, 1.3125)
    >>> round(facts.log_volume, 4), round(facts.entropy_deficit, 4)
    (2.0794, 0.8394)
    """

    sigma_max: float
    sigma_min: float
    condition_number: float
    frobenius_norm: float
    stable_rank: float
    log_volume: float | None
    entropy_deficit: float | None
    relative_error: float
    method: str
    spectrum: tuple[float, ...] | None = None

    @property
    def is_lower_bound(self) -> bool:
        """Whether `condition_number` is a lower bound: fp64 resolves it no better than to 1e-2.

        It is then sigma_max / (sigma_min + d), where d is the possible error of sigma_min.
        """
        return math.isfinite(self.condition_number) and self.relative_error > BOUND_FROM


@fp32_products()
def spectral_facts(
    matrix: Tensor, *, measures: Measures = "basic", rtol: float = 1e-3, spectrum: bool = False
) -> SpectralFacts:
    r"""Spectral facts of one matrix (see `SpectralFacts`).

    A singular value under $\max(m, k) \cdot \varepsilon_{64} \cdot \sigma_1$ is below what fp64 resolves (Golub & Van
    Loan, §5.4.1) and counts as zero: the matrix is then numerically rank-deficient.

    Args:
        matrix: `(m, k)`, any floating dtype and device. Not modified. Extra memory is at most two `(n, n)` matrices
            and a block of rows.
        measures: "basic" leaves `log_volume` and `entropy_deficit` out: they need a factorization.
        rtol: Relative accuracy asked of the condition number.
        spectrum: Whether to return all singular values too, which needs the SVD.

    Returns:
        The facts. `condition_number` and `stable_rank` do not change under `W -> 2^k W`, bit for bit, nor does
        `entropy_deficit` but for the rounding of its logarithms. The same matrix gives the same facts on the same
        device with the same number of threads.

    Raises:
        ValueError: Not a non-empty real matrix, it holds NaN or infinity, or unknown measures.

    >>> weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    >>> facts = spectral_facts(weight, spectrum=True)
    >>> len(facts.spectrum), facts.method
    (64, 'svd')
    >>> round(facts.condition_number, 1)  # near 3, as of any random matrix of this shape
    2.9
    """
    check_measures(measures)
    largest_entry = _checked(matrix)
    tall = tall_of(matrix)
    if largest_entry == 0.0:  # before the routes: all of them divide by sigma_max
        no_volume, all_lost = (-math.inf, math.inf) if measures == "all" else (None, None)
        values = (0.0,) * tall.shape[1] if spectrum else None
        return SpectralFacts(0.0, 0.0, math.inf, 0.0, 0.0, no_volume, all_lost, 0.0, "zero", values)
    tall, exponent = _scaled(tall, largest_entry)
    answer = by_svd(tall) if spectrum else find_ends(tall, measures, rtol)
    sum_of_squares = _sum_of_squares(tall)  # from the entries, since most routes know the two ends only
    facts = facts_of(answer, tall.shape, sum_of_squares, measures, exponent)
    if spectrum and answer.values is not None:
        return replace(facts, spectrum=_stored(answer.values, exponent))
    return facts


def condition_number(weight: Tensor, *, rtol: float = 1e-3) -> float:
    r"""Spectral condition number $\sigma_{\max}/\sigma_{\min}$ (Golub & Van Loan, §2.6.2).

    Args:
        weight: `(out_features, in_features)`, any floating dtype or device. Not modified.
        rtol: Relative accuracy asked for.

    Returns:
        A float in `[1, inf]`, `inf` for a numerically rank-deficient weight. Unchanged by `W -> cW`, `c != 0`.

    Raises:
        ValueError: Not a non-empty matrix, or it holds NaN or infinity.

    >>> weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> condition_number(weight), condition_number(0.5 * weight)
    (4.0, 4.0)
    >>> condition_number(torch.ones(3, 3))  # of rank one
    inf
    """
    return spectral_facts(weight, rtol=rtol).condition_number


@fp32_products()
def condition_number_bound(matrix: Tensor, *, above: float = math.inf, max_steps: int = 24) -> float:
    """A lower bound of the condition number from a few products: Ritz values lie within the spectrum.

    Args:
        matrix: As for `spectral_facts`.
        above: Stop as soon as the bound exceeds this.
        max_steps: Maximum number of products (and as many with the transpose).

    Returns:
        A number that the condition number is not below; the margin for rounding is subtracted.

    Raises:
        ValueError: As `spectral_facts`.

    >>> weight = torch.diag(torch.tensor([1000.0] + 99 * [1.0]))
    >>> condition_number_bound(weight) <= condition_number(weight)
    True
    """
    largest_entry = _checked(matrix)
    if largest_entry == 0.0:
        return math.inf
    tall = tall_of(matrix)
    tall, _ = _scaled(tall, largest_entry)
    dtype = lanczos_dtype(tall)
    bound = 1.0
    for largest, smallest in iter_ritz_values(tall, dtype, max_steps):
        # A computed Ritz value has an error of a few eps * sigma_1: the margin keeps the bound valid in spite of it.
        margin = 16 * torch.finfo(dtype).eps * largest
        bound = max(bound, (largest - margin) / (smallest + margin))
        if bound > above:
            break
    return bound


def _checked(matrix: Tensor) -> float:
    """Makes the checks of every public function and returns the largest magnitude in the matrix."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"expected a non-empty matrix, got a tensor of shape {tuple(matrix.shape)}")
    if not matrix.dtype.is_floating_point:
        raise ValueError(f"expected a real floating-point matrix, got dtype {matrix.dtype}")
    entries = matrix.detach()
    if entries.dtype.itemsize == 1:  # float8 has no arithmetic of its own
        entries = entries.to(torch.float32)
    # Some LAPACK builds return finite singular values for NaN input, so finiteness is tested here.
    lowest, highest = torch.aminmax(entries)
    largest = max(abs(float(lowest)), abs(float(highest)))
    if not math.isfinite(largest):
        count = int((~torch.isfinite(entries)).sum())
        raise NonFiniteError(f"the matrix holds NaN or infinity in {count:,} of {matrix.numel():,} entries")
    return largest


def tall_of(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if it is wide; also of a batch of them."""
    matrix = matrix.detach()
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT


def scale_exponent(largest_entry: float) -> int:
    """The power of two by which a matrix with this largest entry is divided: 0 for ordinary weights."""
    exponent = math.frexp(largest_entry)[1]
    # 2**1000 is still a double; fp64 subnormals need no more.
    return 0 if abs(exponent) <= 12 else max(exponent, -1000)


def _scaled(tall: Tensor, largest_entry: float) -> tuple[Tensor, int]:
    """The matrix, divided by a power of two if it is far from 1, so that squares neither over- nor underflow.

    The division is exact. Ordinary weights are left where they are: no copy is made.
    """
    if tall.dtype.itemsize == 1:
        tall = tall.to(torch.float32)
    exponent = scale_exponent(largest_entry)
    if exponent == 0:
        return tall, 0
    wide = tall.to(torch.float64)
    scaled = torch.ldexp(wide, torch.tensor(-exponent, device=tall.device))
    return (scaled if tall.dtype == torch.float64 else scaled.to(torch.float32)), exponent


def facts_of(
    answer: Answer, shape: tuple[int, ...], sum_of_squares: float, measures: Measures, exponent: int = 0
) -> SpectralFacts:
    """The facts from the ends of a spectrum, of a tall matrix of this shape that was divided by `2**exponent`."""
    m, n = shape
    deficient = answer.smallest <= m * EPS64 * answer.largest
    log_volume = deficit = None
    if measures == "all":
        assert answer.log_volume is not None  # every route has one if the measures are "all"
        log_sum = -math.inf if deficient else answer.log_volume
        log_volume = log_sum + n * exponent * math.log(2.0)
        # Equal singular values give 0 up to rounding, never less.
        # Both terms are of the scaled matrix, so its scale cancels.
        deficit = max(0.5 * n * math.log(sum_of_squares / n) - log_sum, 0.0)
    return SpectralFacts(
        # By a power of two, so scaling back is exact.
        sigma_max=math.ldexp(answer.largest, exponent),
        sigma_min=0.0 if deficient else math.ldexp(answer.smallest, exponent),
        condition_number=math.inf if deficient else _reported_condition(answer),
        frobenius_norm=math.ldexp(math.sqrt(sum_of_squares), exponent),
        stable_rank=min(max(sum_of_squares / answer.largest**2, 1.0), float(n)),  # rounding may leave the range
        log_volume=log_volume,
        entropy_deficit=deficit,
        relative_error=answer.error,
        method=answer.method,
    )


def _sum_of_squares(tall: Tensor) -> float:
    """Sum of the squared entries, by blocks in fp32: a copy of the matrix would take more memory than the rest."""
    norms = []
    for _, block in iter_row_blocks(tall, torch.promote_types(tall.dtype, torch.float32)):
        norms.append(torch.linalg.vector_norm(block, dim=_along(block)))
        del block  # before the next one is made
    # The norms of all rows (or columns) are summed in fp64, so rounding does not grow with their number.
    return float(torch.cat(norms).double().square().sum())


def _along(block: Tensor) -> int:
    """The dimension whose entries are contiguous in memory: along the other one a norm takes 20 times as long."""
    return 0 if block.stride(0) < block.stride(1) else 1


def _reported_condition(answer: Answer) -> float:
    """The ratio of the ends; if its error is too large, a lower bound that holds in spite of the error."""
    ratio = max(1.0, answer.largest / answer.smallest)  # rounding may give less than 1 for equal ends
    return ratio if answer.error <= BOUND_FROM else max(1.0, ratio / (1.0 + answer.error))


def _stored(values: Tensor, exponent: int) -> tuple[float, ...]:
    """The singular values in fp32, as reports store them."""
    exact = torch.ldexp(values.double(), torch.tensor(exponent, device=values.device))
    return tuple(exact.to(torch.float32).tolist())
