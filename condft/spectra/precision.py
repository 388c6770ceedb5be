"""Single-precision products as such, whatever the caller allowed for its own matrices.

`torch.set_float32_matmul_precision("high")` and its likes let fp32 products run in TF32 or bf16, whose rounding is
larger by orders of magnitude than what the routes count on: a figure would be wrong without any sign of it. The same
goes for `torch.autocast`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["fp32_products"]

_FULL = ("none", "ieee")
_LOCK = threading.Lock()
_inside = 0  # threads at work here: the first one to come sets, the last one to go puts back
_before: list[tuple[Any, str]] = []


@contextmanager
def fp32_products() -> Iterator[None]:
    """Products of fp32 matrices in fp32, on the CPU and on CUDA, as long as anyone is inside.

    The setting is the process's: meanwhile other threads' products are in full precision too. It is not touched where
    nothing but full precision is allowed, which is torch's default. Autocast is a thread's own, and off in this one.
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
    """What each backend is allowed; before torch 2.9 one setting for all, which this module calls by the new names."""
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
