"""Makes CONDFT one of PEFT's methods: the place that touches PEFT's tables of methods.

Two of its functions are wrapped elsewhere, each for CondFT adapters only: `hotswap` and
`existing_adapter`.

PEFT has no entry point for methods from outside: `PeftType` is a closed string enum, and `register_peft_method`
asserts membership. A real member is therefore added to it, once. A plain string in the tables would not do:
transformers asks for `peft_type.value`.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

__all__ = ["METHOD_NAME", "PREFIX", "add_peft_type", "register"]

METHOD_NAME = "condft"
PREFIX = "condft_"


def add_peft_type() -> PeftType:
    """Adds the member CONDFT to `PeftType` if it is not there yet, and returns it."""
    name = METHOD_NAME.upper()
    if name not in PeftType.__members__:
        # What the enum's own metaclass does for a member of a str-Enum, after the class is closed.
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType(name)


def register(config_cls: type, model_cls: type) -> None:
    """Enters the method into PEFT's tables; does nothing if it stands there already (a second import)."""
    if add_peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD_NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
