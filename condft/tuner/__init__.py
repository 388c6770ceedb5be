"""CondFT as a PEFT method: config, layer, model, loading and export. Importing this package registers it with PEFT."""

from condft.tuner.choosing.fisher import add_fisher_information
from condft.tuner.config import CondFTConfig
from condft.tuner.export.delta import Delta, apply_delta, combine_deltas, export_delta
from condft.tuner.export.lora import LoraExport, export_lora
from condft.tuner.layers.base import CondFTLayer
from condft.tuner.loading.existing_adapter import check_load_into, swap_adapter
from condft.tuner.loading.load import load
from condft.tuner.model import CondFTModel
from condft.tuner.optimizers import decay_towards_base, parameter_groups
from condft.tuner.patches.hotswap import enable_hotswap
from condft.tuner.patches.load_adapter import check_before_loading
from condft.tuner.registration import peft_type, register

__all__ = [
    "CondFTConfig",
    "CondFTLayer",
    "CondFTModel",
    "Delta",
    "LoraExport",
    "add_fisher_information",
    "apply_delta",
    "combine_deltas",
    "decay_towards_base",
    "export_delta",
    "export_lora",
    "load",
    "parameter_groups",
]

# On import, so that `import condft` is all it takes for PEFT and transformers to know the method. See tuner/patches.
register(CondFTConfig, CondFTModel)
enable_hotswap(peft_type(), CondFTConfig, swap_adapter)
check_before_loading(CondFTConfig, check_load_into)
