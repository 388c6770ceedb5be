r"""The paper's mathematics: what a linear unit does to the entropy of what passes through it (arXiv 2506.16289).

A unit is $y = Wx$ with W of m x k and Gaussian $x \sim N(\mu, \Sigma)$ of k dimensions; $n = \min(m, k)$ and
$\sigma_1 \ge \dots \ge \sigma_n$ are W's singular values. The mean moves nothing below: entropy does not change
under translation. All entropies are differential, in nats; `per_dimension=True` divides by the number of
dimensions that the quantity lives in. A tall W (m > k) maps onto a k-dimensional subspace and y has no density in
m dimensions; its entropy is then taken on that subspace. All is computed in fp64.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = [
    "LIPSCHITZ_CONSTANTS",
    "activation_entropy_bound",
    "entropy_change",
    "entropy_deficit",
    "entropy_deficit_bounds",
    "gaussian_entropy",
    "log_specht_ratio",
    "log_volume",
    "output_covariance",
    "output_entropy",
]

_LOG_2_PI_E = math.log(2.0 * math.pi * math.e)

# sup |phi'| of element-wise activations, to the last bit of a double; the test finds each maximum again.
# gelu: phi' = Phi(x) + x p(x) has phi'' = p(x) (2 - x^2), so it peaks at sqrt(2): (1 + erf 1)/2 + 1/(e sqrt(pi)).
# silu: phi'' = 0 where u tanh(u) = 1 with u = x/2, and phi' is (1 + u)/2 there; u = 1.1996786402577338.
# gelu_tanh (the approximation): peak at 1.4185040087908284, by Newton's method on phi'' in 30 digits.
LIPSCHITZ_CONSTANTS: Mapping[str, float] = MappingProxyType(
    {
        "relu": 1.0,
        "tanh": 1.0,
        "sigmoid": 0.25,
        "gelu": 0.5 * (1.0 + math.erf(1.0)) + 1.0 / (math.e * math.sqrt(math.pi)),  # 1.1289041451851548
        "gelu_tanh": 1.1289930686587717,
        "silu": 1.099839320128867,
    }
)


def output_covariance(weight: Tensor, covariance: Tensor | None = None) -> Tensor:
    r"""Covariance $W \Sigma W^\top$ of $y = Wx$ (bilinearity; true of any x with that covariance, Gaussian or not).

    Args:
        weight: `(m, k)`, any floating dtype and device. Not modified.
        covariance: `(k, k)` of x, symmetric positive definite; None for the identity (whitened x).

    Returns:
        `(m, m)` fp64 tensor on the weight's device, symmetric to the last bit; singular if m > k.

    Raises:
        ValueError: Not a non-empty finite real matrix, or a covariance of another size that is not symmetric
            positive definite.
    """
    mapped = _after_covariance(_checked(weight, "weight"), covariance)
    product = mapped @ mapped.mT
    return 0.5 * (product + product.mT)


def gaussian_entropy(covariance: Tensor, *, per_dimension: bool = False) -> float:
    r"""$h(x) = \frac12 \log((2 \pi e)^k \det\Sigma)$ of a Gaussian (Cover & Thomas 2006, theorem 8.4.1).

    Args:
        covariance: `(k, k)`, symmetric positive definite, any floating dtype and device.
        per_dimension: Divide by k.

    Returns:
        Nats, of either sign.

    Raises:
        ValueError: Not a symmetric positive definite matrix.
    """
    factor = _cholesky(covariance)
    size = factor.shape[0]
    entropy = 0.5 * size * _LOG_2_PI_E + float(factor.diagonal().log().sum())
    return entropy / size if per_dimension else entropy


def log_volume(weight: Tensor, *, per_dimension: bool = False) -> float:
    r"""$\sum \log \sigma_i$: log of the factor by which the map scales n-dimensional volume.

    $\log |\det W|$ of a square W, $\frac12 \log\det W^\top W$ of a tall one (the area formula, Federer 1969, 3.2.3)
    and $\frac12 \log\det W W^\top$ of a wide one (the coarea formula, 3.2.11).

    Args:
        weight: `(m, k)`, any floating dtype and device. Not modified.
        per_dimension: Divide by n.

    Returns:
        Nats; `-inf` if W is numerically rank-deficient.

    Raises:
        ValueError: Not a non-empty finite real matrix.
    """
    logs = _log_singular_values(_checked(weight, "weight"))
    return float(logs.mean() if per_dimension else logs.sum())


def output_entropy(weight: Tensor, covariance: Tensor | None = None, *, per_dimension: bool = False) -> float:
    r"""$h(y)$ of $y = Wx$ for Gaussian x.

    With $\Sigma = LL^\top$, y is the image of a white x under WL, so that
    $h(y) = \frac n2 \log(2 \pi e) + \sum \log \sigma_i(WL)$ in every case (Cover & Thomas 2006, theorem 8.4.1 with
    the corollary of 8.6.4): a square W of full rank; a wide one, where y has m dimensions; a tall one, where y is
    measured on W's k-dimensional image.

    Args:
        weight: `(m, k)`, any floating dtype and device. Not modified.
        covariance: `(k, k)` of x, symmetric positive definite; None for the identity (whitened x).
        per_dimension: Divide by n.

    Returns:
        Nats; `-inf` if W is numerically rank-deficient: y has no density on n dimensions then.

    Raises:
        ValueError: As `output_covariance`.
    """
    logs = _log_singular_values(_after_covariance(_checked(weight, "weight"), covariance))
    entropy = float(logs.mean()) + 0.5 * _LOG_2_PI_E
    return entropy if per_dimension else entropy * logs.numel()


def entropy_change(weight: Tensor, covariance: Tensor | None = None) -> float:
    r"""$h(y) - h(x)$ of $y = Wx$ for Gaussian x.

    For a square or tall W of full rank this is `log_volume(weight)` for any covariance, and for any
    distribution of x (Cover & Thomas 2006, corollary of theorem 8.6.4). A wide W drops k - m dimensions, and their
    entropy counts: the change then depends on the covariance and on the units of x. It has no per-dimension form,
    since x and y have different dimensions.

    Args:
        weight: `(m, k)`, any floating dtype and device. Not modified.
        covariance: `(k, k)` of x, symmetric positive definite; None for the identity (whitened x).

    Returns:
        Nats; `-inf` if W is numerically rank-deficient.

    Raises:
        ValueError: As `output_covariance`.
    """
    input_entropy = 0.5 * weight.shape[-1] * _LOG_2_PI_E if covariance is None else gaussian_entropy(covariance)
    return output_entropy(weight, covariance) - input_entropy


def entropy_deficit(singular_values: Tensor, *, per_dimension: bool = False) -> float:
    r"""$\frac n2 \log(\frac1n \sum\sigma_i^2) - \sum \log\sigma_i \ge 0$: nats lost to unequal singular values.

    The largest log-volume that any matrix of the same Frobenius norm has, less this one's: the inequality of
    arithmetic and geometric means on $\sigma_i^2$ (Hardy, Littlewood & Polya 1934, §2.5), with equality only for
    equal singular values. $e^{-2 \cdot \text{deficit}}$ is the sphericity statistic of Mauchly 1940.

    Args:
        singular_values: `(n,)`, not negative, any order, floating dtype and device.
        per_dimension: Divide by n.

    Returns:
        Nats, unchanged by scaling; `inf` if one is zero.

    Raises:
        ValueError: Not a non-empty vector of finite numbers that are not negative.
    """
    values = _checked(singular_values, "singular_values", ndim=1)
    if bool((values < 0.0).any()):
        raise ValueError(f"singular values are not negative, the smallest of these is {float(values.min())}")
    if not bool(values.all()):
        return math.inf
    relative = values / values.max()  # scale-free, and its squares cannot overflow
    # max: for equal singular values, rounding may leave the difference just below 0.
    deficit = max(0.0, float(0.5 * relative.square().mean().log() - relative.log().mean()))
    return deficit if per_dimension else deficit * values.numel()


def entropy_deficit_bounds(
    condition_number: float, dimension: int, *, per_dimension: bool = False
) -> tuple[float, float]:
    r"""What the condition number alone says about the entropy deficit of n singular values.

    At least $\log\frac{\kappa + 1/\kappa}2$, for any n: the two ends lose that much, and the loss is smallest
    where all the others equal $\sqrt{(\sigma_1^2 + \sigma_n^2)/2}$, which attains it (set the derivative in each of
    them to zero). At most $\frac n2 \log S(\kappa^2)$ with Specht's ratio, the largest quotient of arithmetic and
    geometric mean of numbers between 1 and $\kappa^2$ (Specht 1960). The lower bound is attained for every n >= 2,
    the upper one approached for large n: the two ends leave the whole spectrum's loss open by a factor that grows
    with n, and a large condition number can cost next to nothing per dimension.

    Args:
        condition_number: In `[1, inf]`; exactly 1 if n = 1.
        dimension: n, at least 1.
        per_dimension: Divide both by n.

    Returns:
        Lower and upper bound in nats.

    Raises:
        ValueError: A condition number under 1, one over 1 for a single dimension, or no dimension.
    """
    if dimension < 1:
        raise ValueError(f"a spectrum has at least one dimension, got {dimension}")
    if not condition_number >= 1.0 or (dimension == 1 and condition_number > 1.0):
        raise ValueError(f"no {dimension} singular values have a condition number of {condition_number}")
    if math.isinf(condition_number):
        return math.inf, math.inf
    # (kappa + 1/kappa)/2 - 1 = (kappa - 1)^2 / (2 kappa), so nothing cancels near 1; divided before it overflows.
    excess = condition_number - 1.0
    lower = math.log1p(0.5 * excess * (excess / condition_number))
    upper = 0.5 * dimension * log_specht_ratio(condition_number)
    return (lower / dimension, upper / dimension) if per_dimension else (lower, upper)


def log_specht_ratio(condition_number: float) -> float:
    r"""$\log S(\kappa^2)$ of Specht's ratio $S(h) = \frac{(h - 1) h^{1/(h - 1)}}{e \log h}$ (Specht 1960).

    With $u = \log\kappa$ it is $\log\frac{\sinh u}u + u \coth u - 1$, which neither overflows nor, with its series
    near 0, cancels.

    Args:
        condition_number: In `[1, inf]`.

    Returns:
        A float in `[0, inf]`: about $u^2/2$ for small u, $2u - \log 2u - 1$ for large.

    Raises:
        ValueError: A condition number under 1 or NaN.
    """
    if not condition_number >= 1.0:
        raise ValueError(f"a condition number is at least 1, got {condition_number}")
    u = math.log(condition_number)
    if u < 0.05:  # the next term is under 2e-15 of the first
        square = u * u
        return square * (1.0 / 2.0 - square * (1.0 / 36.0 - square * (1.0 / 405.0 - square / 4200.0)))
    if math.isinf(u):
        return math.inf
    log_sinh = u + math.log1p(-math.exp(-2.0 * u)) - math.log(2.0)
    return log_sinh - math.log(u) + u / math.tanh(u) - 1.0


def activation_entropy_bound(entropy: float, dimension: int, lipschitz_constant: float) -> float:
    r"""Upper bound $h(\varphi(y)) \le h(y) + m \log L$ for an element-wise $\varphi$ with $|\varphi'| \le L$.

    $h(\varphi(y)) \le h(y) + E \sum_i \log|\varphi'(y_i)|$, with equality for an injective $\varphi$ (change of
    variables; Papoulis & Pillai 2002, §14-3), and every term is at most log L. Where $\varphi$ is flat on a
    set of positive probability (ReLU) the output has no density and its entropy counts as `-inf`; on the
    image of the active coordinates ReLU is the identity and the bound is an equality with L = 1. So tanh,
    sigmoid and ReLU never add entropy, while GELU and SiLU may add up to 0.1213 and 0.0952 nats per coordinate.

    Args:
        entropy: h(y) in nats.
        dimension: m, the number of coordinates of y.
        lipschitz_constant: L > 0, see `LIPSCHITZ_CONSTANTS`.

    Returns:
        Nats.

    Raises:
        ValueError: No coordinates, or an L that is not a positive number.
    """
    if dimension < 1 or not 0.0 < lipschitz_constant < math.inf:
        raise ValueError(
            f"needs at least one coordinate and a positive finite Lipschitz constant, got {dimension} and "
            f"{lipschitz_constant}"
        )
    return entropy + dimension * math.log(lipschitz_constant)


def _checked(tensor: Tensor, name: str, ndim: int = 2) -> Tensor:
    """The tensor in fp64, or a ValueError that names it."""
    if tensor.ndim != ndim or tensor.numel() == 0:
        kind = "matrix" if ndim == 2 else "vector"
        raise ValueError(f"{name} has to be a non-empty {kind}, got a tensor of shape {tuple(tensor.shape)}")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} has to be real and floating-point, got dtype {tensor.dtype}")
    working = tensor.detach().to(torch.float64)
    bad = int((~torch.isfinite(working)).sum())
    if bad:
        raise ValueError(f"{name} holds NaN or infinity in {bad:,} of {working.numel():,} entries")
    return working


def _cholesky(covariance: Tensor) -> Tensor:
    """L of covariance = L L^T, lower triangular."""
    working = _checked(covariance, "covariance")
    rounding = 1e-5 * float(working.abs().max())  # what a covariance estimated in fp32 may differ by
    if working.shape[0] != working.shape[1] or not torch.allclose(working, working.mT, rtol=0.0, atol=rounding):
        raise ValueError(f"covariance has to be symmetric, got a matrix of shape {tuple(working.shape)} that is not")
    factor, failed_at = torch.linalg.cholesky_ex(0.5 * (working + working.mT))
    if int(failed_at) > 0:
        raise ValueError(
            f"covariance is not positive definite: its leading {int(failed_at)} x {int(failed_at)} block is singular "
            "or indefinite. Restrict x to the subspace it varies in."
        )
    return factor


def _after_covariance(matrix: Tensor, covariance: Tensor | None) -> Tensor:
    """W L, the map from white noise to y."""
    if covariance is None:
        return matrix
    if tuple(covariance.shape) != (matrix.shape[1],) * 2:
        raise ValueError(
            f"a weight of shape {tuple(matrix.shape)} needs a covariance of {matrix.shape[1]} x {matrix.shape[1]}, "
            f"got shape {tuple(covariance.shape)}"
        )
    return matrix @ _cholesky(covariance).to(matrix.device)


def _log_singular_values(matrix: Tensor) -> Tensor:
    """Logarithms of the n singular values; -inf for one under the SVD's own error (Golub & Van Loan, §5.4.1)."""
    values = torch.linalg.svdvals(matrix)
    noise = max(matrix.shape) * torch.finfo(torch.float64).eps * values[0]
    return torch.where(values > noise, values, 0.0).log()
