r"""The spectral figures of random matrices, which shape alone explains. Pure mathematics, no torch.

Throughout, a matrix has independent standard normal entries, n = min(rows, columns) and N = max(rows, columns).
Condition number, stable rank and entropy deficit do not depend on the entries' variance, so these are the figures
of a freshly initialized weight, to which a trained one is compared.

The median of $\sigma_{\max}/\sigma_{\min}$ is computed from the medians of both ends of the spectrum, whose
correlation vanishes as n grows:

- The upper end, and the lower end for N - n >= 4, are at the Marchenko-Pastur edges $(\sqrt N \pm \sqrt n)^2$ of
  $\sigma^2$ up to Tracy-Widom fluctuations. With N - 1/2 and n - 1/2 instead of N and n, and the logarithm of the
  lower end, the error is $O(n^{-2/3})$ (Ma 2012, "Accuracy of the Tracy-Widom limits for the extreme
  eigenvalues in white Wishart matrices").
- For N - n <= 3 the lower edge says nothing: it is nearer to zero than the fluctuations are wide, and for a square
  matrix it is zero. There $\sigma_{\min}^2 (N + n - 1)/2$ has the hard-edge law of its N - n: Edelman 1988
  for 0 and 1, Forrester 1994 for 3.

Compared with simulation the error of the median is 8 % at worst (n = 2, or N - n = 4) and 3 % from N - n = 8 on
(tests/selection/test_random_matrix.py).
"""

import math

__all__ = [
    "EDELMAN_MEDIAN",
    "edelman_cdf",
    "expected_condition_number",
    "expected_entropy_deficit",
    "expected_log_volume",
    "expected_stable_rank",
    "marchenko_pastur_condition_number",
    "marchenko_pastur_quantile",
    "relative_condition_number",
]

# Median of Edelman's law exp(-2/x - 2/x^2): with s = 2/x it is where s + s^2/2 = log 2. About 3.6713.
EDELMAN_MEDIAN = 2.0 / (math.sqrt(1.0 + 2.0 * math.log(2.0)) - 1.0)

# Median of the Tracy-Widom law of real matrices; from its Painleve II form, as the test integrates it again.
_TRACY_WIDOM_MEDIAN = -1.268574611

# Medians of t = sigma_min^2 (N + n - 1)/2 at the hard edge, by N - n. P(t > x) is exp(-x/2 - sqrt(x)) for 0,
# exp(-x/2) for 1 and exp(-x/2) I_1(2 sqrt(x))/sqrt(x) for 3; for 2 there is no such closed form, so that sqrt(t) is
# interpolated by the parabola through the other three (simulation agrees to 1 %).
_HARD_EDGE_MEDIANS = (4.0 / EDELMAN_MEDIAN**2, 2.0 * math.log(2.0), 3.1579888123, 5.4931773475)


def marchenko_pastur_condition_number(rows: int, columns: int) -> float:
    r"""Ratio of the Marchenko-Pastur edges, $(1 + \sqrt\beta)/(1 - \sqrt\beta)$ with $\beta = n/N$.

    The limit of the condition number for n, N to infinity at a fixed ratio (Marchenko & Pastur 1967 for the edges,
    Bai & Yin 1993 for the smallest singular value). `expected_condition_number` is its finite-size form.

    Args:
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        A float in `(1, inf]`; `inf` for a square, whose lower edge is zero.

    Raises:
        ValueError: A dimension under 1.
    """
    n, long = _sides(rows, columns)
    root = math.sqrt(n / long)
    return math.inf if n == long else (1.0 + root) / (1.0 - root)


def marchenko_pastur_quantile(probability: float, rows: int, columns: int) -> float:
    r"""Singular value that the given share of a random matrix's singular values lies under (Marchenko & Pastur 1967).

    With $r = \sqrt{n/N}$ and $\sigma^2/N = 1 + r^2 - 2r\cos\theta$ the density becomes
    $\frac2\pi \sin^2\theta / (1 + r^2 - 2r\cos\theta)$ on $[0, \pi]$. Expanding the denominator in
    Chebyshev polynomials of the second kind and integrating term by term gives the distribution

    $$G(\theta) = \frac1\pi\left[\theta + \frac{\sin\theta}r - \left(\frac1{r^2} - 1\right) \arctan
    \frac{r\sin\theta}{1 - r\cos\theta}\right],$$

    which is the quarter circle's for squares. It is inverted by bisection.

    Args:
        probability: In [0, 1]; 0 and 1 give the edges of the spectrum.
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        A singular value in $[\sqrt N - \sqrt n, \sqrt N + \sqrt n]$, for entries of unit variance. That of a finite
        matrix at its i-th smallest lies near probability (i - 1/2) / n.

    Raises:
        ValueError: A probability outside [0, 1], or a dimension under 1.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"a probability lies in [0, 1], got {probability}")
    n, long = _sides(rows, columns)
    r = math.sqrt(n / long)

    def share_under(theta: float) -> float:
        angle = math.atan2(r * math.sin(theta), 1.0 - r * math.cos(theta))
        return (theta + math.sin(theta) / r - (1.0 / r**2 - 1.0) * angle) / math.pi

    low, high = 0.0, math.pi
    for _ in range(54):  # to the last bit of theta
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share_under(middle) < probability else (low, middle)
    # 1 + r^2 - 2r cos(theta) without its cancellation at the lower edge.
    return math.sqrt(long * ((1.0 - r) ** 2 + 4.0 * r * math.sin(0.25 * (low + high)) ** 2))


def edelman_cdf(ratio: float) -> float:
    r"""$\lim_n P(\kappa/n < x) = e^{-2/x - 2/x^2}$ for square n x n matrices (Edelman 1988).

    Args:
        ratio: The x: condition number over n.

    Returns:
        A probability. Its tail is heavy, $1 - P \approx 2/x$: the mean condition number is infinite.
    """
    # Divided twice, since the square of a small ratio may underflow to 0.
    return math.exp(-2.0 / ratio - 2.0 / ratio / ratio) if ratio > 0.0 else 0.0


def expected_condition_number(rows: int, columns: int) -> float:
    r"""Median condition number of a random matrix of that shape (see the head of this module).

    The median, since the mean of a square one is infinite. It tends to `EDELMAN_MEDIAN * n` for squares and to
    `marchenko_pastur_condition_number` for rectangles, and is exactly 1 where n = 1.

    Args:
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        A float in `[1, inf)`, unchanged by transposition.

    Raises:
        ValueError: A dimension under 1.

    >>> round(expected_condition_number(4096, 1024), 2), round(expected_condition_number(1024, 1024))
    (2.98, 3743)
    """
    n, long = _sides(rows, columns)
    return 1.0 if n == 1 else math.sqrt(_largest_square(n, long) / _smallest_square(n, long))


def relative_condition_number(kappa: float, rows: int, columns: int) -> float:
    r"""$\log(\kappa / \kappa_\text{random})$: how far a condition number lies above that of chance, in nats.

    Args:
        kappa: Condition number of a rows x columns matrix, in `[1, inf]`.
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        0 for a typical random matrix of that shape, negative for a better conditioned one, `inf` for `inf`.

    Raises:
        ValueError: `kappa` is under 1 or NaN, or a dimension is under 1.
    """
    # Not `kappa < 1.0`, which NaN would pass.
    if not kappa >= 1.0:
        raise ValueError(f"a condition number is at least 1, got {kappa}")
    return math.log(kappa) - math.log(expected_condition_number(rows, columns))


def expected_stable_rank(rows: int, columns: int) -> float:
    r"""Stable rank $\|W\|_F^2/\sigma_{\max}^2$ of a random matrix, with $\|W\|_F^2$ at its mean, rows * columns.

    Args:
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        A float in `[1, n]`, about $nN/(\sqrt N + \sqrt n)^2$; exactly 1 where n = 1. Too high by a tenth and more
        for n = 2 and 3, where the norm is mostly the largest singular value itself.

    Raises:
        ValueError: A dimension under 1.
    """
    n, long = _sides(rows, columns)
    return 1.0 if n == 1 else max(1.0, n * long / _largest_square(n, long))


def expected_log_volume(rows: int, columns: int) -> float:
    r"""Mean of $\frac1n \sum \log \sigma_i$ of a random matrix with entries of unit variance.

    $\prod \sigma_i^2$ is distributed as a product of independent $\chi^2$ of N, N - 1, ..., N - n + 1 degrees of
    freedom (Muirhead 1982, theorem 3.2.15), and $E \log \chi^2_k = \psi(k/2) + \log 2 \approx
    \log k - 1/k$. The sum over k is taken in closed form.

    Args:
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        Nats per dimension. Entries of standard deviation s add log s.

    Raises:
        ValueError: A dimension under 1.
    """
    n, long = _sides(rows, columns)
    log_product = math.lgamma(long + 1) - math.lgamma(long - n + 1)
    harmonic = math.log((long + 0.5) / (long - n + 0.5))  # the sum of 1/k by the midpoint rule
    return 0.5 * (log_product - harmonic) / n


def expected_entropy_deficit(rows: int, columns: int) -> float:
    r"""Mean entropy deficit per dimension of a random matrix: 1/2 for large squares, $\beta/4$ for long rectangles.

    $\frac12 E \log \frac{\|W\|_F^2}n - \frac1n E \sum \log \sigma_i$, both as in `expected_log_volume`;
    $\|W\|_F^2$ is $\chi^2$ of nN degrees of freedom.

    Args:
        rows: Of the matrix, at least 1.
        columns: Of the matrix, at least 1.

    Returns:
        Nats per dimension, at least 0; exactly 0 where n = 1.

    Raises:
        ValueError: A dimension under 1.
    """
    n, long = _sides(rows, columns)
    if n == 1:
        return 0.0
    # E log chi^2 of k degrees of freedom is about log k - 1/k, which is about log(k - 1).
    return max(0.0, 0.5 * math.log((n * long - 1.0) / n) - expected_log_volume(rows, columns))


def _sides(rows: int, columns: int) -> tuple[int, int]:
    if rows < 1 or columns < 1:
        raise ValueError(f"a matrix has at least one row and one column, got {rows} x {columns}")
    return min(rows, columns), max(rows, columns)


def _largest_square(n: int, long: int) -> float:
    """Median of sigma_max^2 (Ma 2012; centering and scaling of Johnstone 2001 with the halves)."""
    a, b = math.sqrt(long - 0.5), math.sqrt(n - 0.5)
    return (a + b) ** 2 + _TRACY_WIDOM_MEDIAN * (a + b) * (1.0 / a + 1.0 / b) ** (1.0 / 3.0)


def _smallest_square(n: int, long: int) -> float:
    """Median of sigma_min^2."""
    excess = long - n
    if excess < len(_HARD_EDGE_MEDIANS):
        return _HARD_EDGE_MEDIANS[excess] / (0.5 * (long + n - 1))
    a, b = math.sqrt(long - 0.5), math.sqrt(n - 0.5)
    gap = excess / (a + b)  # a - b without its cancellation
    # log sigma_min^2 is a mirrored Tracy-Widom variable with this scale (Ma 2012, theorem 2).
    scale = (gap / (a * b)) ** (1.0 / 3.0) / gap
    return gap**2 * math.exp(scale**2 / 8.0 - _TRACY_WIDOM_MEDIAN * scale)
