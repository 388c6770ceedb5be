"""condft: teach a pre-trained LLM something new by training only its weights of low condition number.

`import condft` enters CondFT into PEFT's tables, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' adapter methods know it.
"""

from condft.analysis import NonFiniteWeightError, analyze
from condft.report import SpectralReport, SpectralRow
from condft.selection import Selection, select_units
from condft.spectra import condition_number, spectral_facts
from condft.tuner import CondFTConfig, CondFTModel

__version__ = "0.1.0"

__all__ = [
    "CondFTConfig",
    "CondFTModel",
    "NonFiniteWeightError",
    "Selection",
    "SpectralReport",
    "SpectralRow",
    "analyze",
    "condition_number",
    "select_units",
    "spectral_facts",
]
