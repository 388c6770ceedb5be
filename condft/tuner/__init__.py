"""CondFT as a PEFT method: config, layer, model, and its entry into PEFT's tables (on import)."""

from condft.tuner.config import CondFTConfig
from condft.tuner.layer import CondFTLayer
from condft.tuner.model import CondFTModel
from condft.tuner.optimizers import decay_towards_base, parameter_groups
from condft.tuner.registration import register

__all__ = ["CondFTConfig", "CondFTLayer", "CondFTModel", "decay_towards_base", "parameter_groups"]

register(CondFTConfig, CondFTModel)
