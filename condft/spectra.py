r"""Spectral facts of one matrix: its singular values in fp64, and what follows from them. torch only.

Everything here is a function of the singular values $\sigma_1 \ge \dots \ge \sigma_n$, $n = \min(m, k)$ of an
$m \times k$ matrix. Correct first: a full spectrum from a backward-stable SVD in double precision.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_QR_ROWS = 2048

__all__ = ["SpectralFacts", "condition_number", "singular_values", "spectral_facts"]


@dataclass(frozen=True)
class SpectralFacts:
    r"""What a spectrum says, with $n = \min(m, k)$ singular values.

    Attributes:
        sigma_max: Largest singular value.
        sigma_min: Smallest of the n; 0 for a numerically rank-deficient matrix.
        condition_number: sigma_max / sigma_min in `[1, inf]`; `inf` if rank-deficient or zero.
        frobenius_norm: $\sqrt{\sum \sigma_i^2}$.
        stable_rank: $\sum \sigma_i^2 / \sigma_1^2$ in `[1, n]` (Rudelson & Vershynin 2007); 0 for a zero matrix.
        log_volume: $\sum \log \sigma_i$ in nats, the log of the factor by which the map scales n-dimensional
            volume; `-inf` if rank-deficient.
        entropy_deficit: $\frac n2 \log(\frac1n \sum \sigma_i^2) - \sum \log \sigma_i \ge 0$ in nats: how much
            less entropy the map passes on than the best-conditioned one of the same Frobenius norm (AM-GM
            inequality on $\sigma_i^2$); 0 only for equal singular values, `inf` if rank-deficient.
    """

    sigma_max: float
    sigma_min: float
    condition_number: float
    frobenius_norm: float
    stable_rank: float
    log_volume: float
    entropy_deficit: float


def singular_values(matrix: Tensor) -> tuple[Tensor, int]:
    r"""Singular values of a matrix, as mantissas and one common exponent.

    The matrix is first divided by the power of two nearest its largest entry. That division is exact, so
    `W -> 2^k W` changes nothing but the exponent, and neither tiny nor huge weights under- or overflow. A tall
    matrix is reduced to its triangular factor before the SVD (Golub & Van Loan, §8.6.3), a wide one transposed.

    Args:
        matrix: `(m, k)`, any floating dtype and device. Not modified.

    Returns:
        `(n,)` fp64 tensor, descending, on the matrix's device, and the exponent e: the singular values are
        `mantissas * 2**e`.

    Raises:
        ValueError: Not a non-empty real matrix, or it holds NaN or infinity.
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"expected a non-empty matrix, got a tensor of shape {tuple(matrix.shape)}")
    if not matrix.dtype.is_floating_point:
        raise ValueError(f"expected a real floating-point matrix, got dtype {matrix.dtype}")
    working = matrix.detach().to(torch.float64)
    # Some LAPACK builds return finite singular values for NaN input, so finiteness is tested here.
    largest = float(working.abs().max())
    if not math.isfinite(largest):
        count = int((~torch.isfinite(working)).sum())
        raise ValueError(f"the matrix holds NaN or infinity in {count:,} of {working.numel():,} entries")
    if largest == 0.0:
        return working.new_zeros(min(working.shape)), 0
    exponent = max(math.frexp(largest)[1], -1000)  # 2**1000 is still a double; fp64 subnormals need no more
    working = torch.ldexp(working, torch.tensor(-exponent, device=working.device))
    if working.shape[0] < working.shape[1]:
        working = working.mT
    working = working.contiguous()
    if working.shape[0] > 2 * working.shape[1]:
        working = _triangular_factor(working)
    return torch.linalg.svdvals(working), exponent


def _triangular_factor(tall: Tensor) -> Tensor:
    """R of a tall matrix's QR, folding in one block of rows after the other (sequential TSQR, Demmel et al. 2012).

    As backward stable as one QR of the whole, but each block stays in the cache.
    """
    columns = tall.shape[1]
    factor = tall[:0]
    for block in tall.split(max(_QR_ROWS, 2 * columns)):
        factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    return factor


def spectral_facts(matrix: Tensor) -> SpectralFacts:
    r"""All spectral facts of one matrix (see `SpectralFacts`).

    A singular value under $\max(m, k) \cdot \varepsilon_{64} \cdot \sigma_1$ is below what the SVD's backward
    error resolves (Golub & Van Loan, §5.4.1) and counts as zero: the matrix is then numerically rank-deficient.

    Args:
        matrix: `(m, k)`, any floating dtype and device. Not modified.

    Returns:
        The facts. `condition_number`, `stable_rank` and `entropy_deficit` do not change under `W -> 2^k W`,
        bit for bit.

    Raises:
        ValueError: Not a non-empty real matrix, or it holds NaN or infinity.
    """
    mantissas, exponent = singular_values(matrix)
    count = mantissas.numel()
    largest, smallest = float(mantissas[0]), float(mantissas[-1])
    if largest == 0.0:
        return SpectralFacts(0.0, 0.0, math.inf, 0.0, 0.0, -math.inf, math.inf)
    sum_of_squares = float(mantissas.square().sum())
    deficient = smallest <= max(matrix.shape) * torch.finfo(torch.float64).eps * largest
    log_sum = -math.inf if deficient else float(mantissas.log().sum())
    deficit = 0.5 * count * math.log(sum_of_squares / count) - log_sum
    return SpectralFacts(
        sigma_max=math.ldexp(largest, exponent),
        sigma_min=0.0 if deficient else math.ldexp(smallest, exponent),
        condition_number=math.inf if deficient else largest / smallest,
        frobenius_norm=math.ldexp(math.sqrt(sum_of_squares), exponent),
        stable_rank=sum_of_squares / largest**2,
        log_volume=log_sum + count * exponent * math.log(2.0),
        entropy_deficit=max(deficit, 0.0),  # equal singular values give 0 up to rounding, never less
    )


def condition_number(weight: Tensor) -> float:
    r"""Spectral condition number $\sigma_{\max}/\sigma_{\min}$ (Golub & Van Loan, §2.6.2).

    Args:
        weight: `(out_features, in_features)`, any floating dtype or device. Not modified.

    Returns:
        A float in `[1, inf]`, `inf` for a numerically rank-deficient weight. Unchanged by `W -> cW`, `c != 0`.

    Raises:
        ValueError: Not a non-empty matrix, or it holds NaN or infinity.
    """
    return spectral_facts(weight).condition_number
