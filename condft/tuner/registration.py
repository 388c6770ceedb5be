"""Makes CONDFT one of PEFT's methods. Its changes to PEFT itself are in `condft.tuner.patches`."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from condft.tuner.patches.peft_type import add_peft_type

__all__ = ["METHOD_NAME", "PREFIX", "peft_type", "register"]

METHOD_NAME = "condft"
# PEFT finds an adapter's tensors in a state_dict by this prefix of the attribute that holds them.
PREFIX = "condft_"


def peft_type() -> PeftType:
    """PEFT's member for the method, `PeftType.CONDFT`.

    >>> peft_type().value
    'CONDFT'
    """
    return add_peft_type(METHOD_NAME.upper())


def register(config_cls: type, model_cls: type) -> None:
    """Enters the method into PEFT's tables. Does nothing if it is there already, as on a second import.

    Args:
        config_cls: The class of its configs.
        model_cls: The tuner class, a `BaseTuner`.
    """
    # PEFT (0.21) raises a KeyError for a method that is registered twice.
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD_NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
