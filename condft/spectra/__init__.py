"""Numerics: matrices in, spectral facts out. Needs torch only; `condft.spectra.routes` explains how they are found.

>>> import torch
>>> facts = spectral_facts(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
>>> facts.sigma_max, facts.sigma_min, facts.condition_number
(4.0, 1.0, 4.0)
"""

from condft.spectra.batched.facts import batch_size, batched_facts
from condft.spectra.factor import singular_values
from condft.spectra.facts import (
    NonFiniteError,
    SpectralFacts,
    condition_number,
    condition_number_bound,
    spectral_facts,
)
from condft.spectra.noise import code_rounding_error, rounding_noise

__all__ = [
    "NonFiniteError",
    "SpectralFacts",
    "batch_size",
    "batched_facts",
    "code_rounding_error",
    "condition_number",
    "condition_number_bound",
    "rounding_noise",
    "singular_values",
    "spectral_facts",
]
