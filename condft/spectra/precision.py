"""Products of fp32 matrices in full fp32, also if the caller has allowed less for its own matrices.

`torch.set_float32_matmul_precision("high")` lets fp32 products run in TF32 or bf16. Their rounding is larger by orders
of magnitude than the routes assume: a figure would be wrong, and nothing would show it. The same holds under
`torch.autocast`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["fp32_products"]

_FULL = ("none", "ieee")
# Two threads must not enter or leave at once. It is not held in between: the work itself runs in parallel.
_LOCK = threading.Lock()
_inside = 0  # threads inside `fp32_products`: the first to enter changes the setting, the last to leave restores it
_before: list[tuple[Any, str]] = []  # what the first one found, and the last one restores


@contextmanager
def fp32_products() -> Iterator[None]:
    """Inside, products of fp32 matrices are computed in fp32, on the CPU and on CUDA.

    torch's setting belongs to the whole process: until the last thread has left, other threads' products are in full
    precision too. It is not touched if only full precision is allowed, which is torch's default. Autocast belongs to a
    thread, and is turned off in this one.
    """
    global _inside
    with _LOCK:
        if _inside == 0:
            _before[:] = [(backend, allowed) for backend, allowed in _allowed() if allowed not in _FULL]
            for backend, _ in _before:
                _allow(backend, "ieee")
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                for backend, allowed in _before:
                    _allow(backend, allowed)
                _before.clear()


def _allowed() -> list[tuple[Any, str]]:
    """Each backend and the precision that it may use.

    torch 2.9 gave each backend a setting of its own. Older versions have one for all, returned here by the new names.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        return [(backend, backend.fp32_precision) for backend in backends]
    overall = torch.get_float32_matmul_precision()
    return [(None, "ieee" if overall == "highest" else overall)]


def _allow(backend: Any, precision: str) -> None:
    if backend is None:
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)
    else:
        backend.fp32_precision = precision
