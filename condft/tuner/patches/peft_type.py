"""Adds a member to PEFT's enum of methods.

PEFT (0.21) has no entry point for methods of other packages: `PeftType` is a closed string enum, and
`register_peft_method` refuses a name that is not in it. A plain string in PEFT's tables would not be enough, because
transformers reads `peft_type.value`.
"""

from peft.utils import PeftType

__all__ = ["add_peft_type"]


def add_peft_type(name: str) -> PeftType:
    """Returns the member of `PeftType` with this name; adds it first if it is missing.

    Args:
        name: In capitals, such as "CONDFT".
    """
    if name not in PeftType.__members__:
        # What the enum's own metaclass does for each member of a str-Enum while the class is being made.
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType(name)
