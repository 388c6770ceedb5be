"""Numerics: matrices in, spectral facts out. torch only; see `condft.spectra.routes` for how they are found."""

from condft.spectra.batched.facts import batch_size, batched_facts
from condft.spectra.facts import (
    Measures,
    NonFiniteError,
    SpectralFacts,
    condition_number,
    condition_number_bound,
    spectral_facts,
)
from condft.spectra.noise import code_rounding_error, rounding_noise
from condft.spectra.reference import singular_values
from condft.spectra.routes import check_measures

__all__ = [
    "Measures",
    "NonFiniteError",
    "SpectralFacts",
    "batch_size",
    "batched_facts",
    "check_measures",
    "code_rounding_error",
    "condition_number",
    "condition_number_bound",
    "rounding_noise",
    "singular_values",
    "spectral_facts",
]
