"""Matrices with known singular values."""

import numpy as np
import torch


def planted(shape: tuple[int, int], spectrum: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A matrix with given singular values between random orthogonal factors, fp64."""
    rng = np.random.default_rng(seed)
    n = min(shape)
    left = np.linalg.qr(rng.standard_normal((shape[0], n)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], n)))[0]
    return torch.from_numpy(left * spectrum @ right.T)


def random_matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def reference(matrix: torch.Tensor) -> np.ndarray:
    """Singular values by NumPy's fp64 SVD of the entries as they are stored."""
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)
