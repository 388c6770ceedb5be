"""How far an analysis is from what its route must move and multiply: counted traffic and flops at measured rates.

A `TorchDispatchMode` sees every operation that the route runs. Operations on something as large as the matrix count
as a pass, with the bytes that they read and write; products and factorizations count their flops too. The limit is
the time of those bytes at the measured bandwidth plus that of those flops at the measured rate of a fp64 GEMM.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CountedWork", "distance_to_limit", "machine_rates"]


class CountedWork(TorchDispatchMode):
    """Counts bytes moved by operations on large tensors, and flops of dense products and factorizations.

    Args:
        large: Elements from which a tensor counts as a pass over the matrix (or over a block of it).

    Attributes:
        bytes: Read and written by those operations.
        flops: Of matrix-matrix products, LU, Cholesky, QR, and solves with many right-hand sides.
    """

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.bytes = 0
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view moves no bytes.
        if func.is_view:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs) if t.numel() >= self.large)
        self.flops += _flops(func.overloadpacket.__name__, inputs)
        return result


def _flops(name: str, inputs: list[Tensor]) -> float:
    """Leading terms (Golub & Van Loan, §1.1, 3.2, 4.2, 5.2)."""
    matrices = [t for t in inputs if t.ndim >= 2]
    if not matrices or min(matrices[0].shape[-2:]) < 2:
        return 0.0
    *batch, m, n = matrices[0].shape
    count = math.prod(batch)
    if name in ("linalg_lu_factor_ex", "_linalg_det"):
        return count * 2 / 3 * n**3
    if name == "linalg_cholesky_ex":
        return count * n**3 / 3
    if name == "linalg_qr":
        return count * (2 * m * n**2 - 2 / 3 * n**3)
    if name in ("_linalg_svd", "linalg_svdvals"):
        return count * 8 / 3 * max(m, n) * min(m, n) ** 2
    if name in ("mm", "bmm", "addmm", "baddbmm") and matrices[-1].shape[-1] > 1:
        return 2.0 * matrices[-2].numel() * matrices[-1].shape[-1]
    return 0.0


def machine_rates(repeats: int = 5) -> dict[str, float]:
    """Bytes a second of a pass over a matrix much larger than any cache, and flops a second of a fp64 GEMM."""
    tall = torch.randn(14336, 4096)
    vector = torch.randn(4096)
    square = torch.randn(2048, 2048, dtype=torch.float64)
    return {
        "bytes_per_second": tall.numel() * 4 / _median_seconds(lambda: tall @ vector, repeats),
        "fp64_flops_per_second": 2 * 2048**3 / _median_seconds(lambda: square @ square, repeats),
    }


def distance_to_limit(
    work: Callable[[], Any], large: int, rates: Mapping[str, float], seconds: float
) -> dict[str, float]:
    """Seconds taken over the seconds that the counted bytes and flops need at the machine's rates."""
    with CountedWork(large) as counted:
        work()
    limit = counted.bytes / rates["bytes_per_second"] + counted.flops / rates["fp64_flops_per_second"]
    return {
        "bytes": counted.bytes,
        "flops": counted.flops,
        "limit_seconds": limit,
        "seconds": seconds,
        "ratio": seconds / limit,
    }


def _median_seconds(function: Callable[[], Any], repeats: int) -> float:
    function()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
