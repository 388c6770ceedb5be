"""Small changes of a weight matrix: storage formats as plain round trips, and noise.

int8 and nf4 are written out here rather than taken from bitsandbytes, which would have to be installed: the same
rounding (`tests/scripts/research/kappa/test_kappa.py` compares them where it is), in fp32, without its kernels.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_NF4_BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023, "QLoRA", appendix E).
_NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NOISE_SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Variant:
    """One small change.

    Attributes:
        name: `bf16`, `noise`, ...
        amount: Of noise, ‖ΔW‖/‖W‖; 0 where there is nothing to choose.
        change: Name and weight in, changed weight out (a new tensor; the weight is not modified).
    """

    name: str
    amount: float
    change: Callable[[str, Tensor], Tensor]


def int8_round_trip(weight: Tensor) -> Tensor:
    """Each row to 255 levels of its largest absolute value, as LLM.int8 stores weights (Dettmers et al. 2022).

    Args:
        weight: `(out, ...)`, floating; a convolution's row is all that makes one output.

    Returns:
        fp32, the same shape.
    """
    rows = weight.detach().float().flatten(1)
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    codes = (rows / torch.where(scales > 0, scales, 1.0)).round()
    return (codes * scales).view(weight.shape)


def nf4_round_trip(weight: Tensor) -> Tensor:
    """Blocks of 64 entries to the 16 levels of NormalFloat4 times their largest absolute value (QLoRA).

    Args:
        weight: Any shape, floating; read in its row-major order, the last block may be short.

    Returns:
        fp32, the same shape.
    """
    flat = weight.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.tensor(_NF4_CODES, device=weight.device)
    relative = blocks / torch.where(scales > 0, scales, 1.0)
    nearest = torch.bucketize(relative, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scales).flatten()[: flat.numel()].view(weight.shape)


def add_noise(name: str, weight: Tensor, *, relative_norm: float) -> Tensor:
    """Adds Gaussian noise of exactly that Frobenius norm, relative to the weight's; drawn by the weight's name."""
    # crc32, because Python salts `hash` of a string anew in every process.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(weight.shape, generator=generator)
    size = relative_norm * float(weight.norm()) / float(noise.norm())
    return weight.detach() + (noise * size).to(weight)


def variants() -> list[Variant]:
    """All of them, the weight as it is first."""
    return [
        Variant("unchanged", 0.0, lambda _, weight: weight.detach().clone()),
        Variant("fp16", 0.0, lambda _, weight: weight.detach().half()),
        Variant("bf16", 0.0, lambda _, weight: weight.detach().bfloat16()),
        Variant("int8", 0.0, lambda _, weight: int8_round_trip(weight)),
        Variant("nf4", 0.0, lambda _, weight: nf4_round_trip(weight)),
        *(Variant("noise", size, _noise(size)) for size in NOISE_SIZES),
    ]


def _noise(size: float) -> Callable[[str, Tensor], Tensor]:
    return lambda name, weight: add_noise(name, weight, relative_norm=size)
