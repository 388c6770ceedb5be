"""YAML 1.2: read strictly, and written so that it is read back as it was.

PyYAML follows YAML 1.1, where `1e-3` is a string and `mixed_precision: no` is False. In a configuration of training
both are traps, and PyYAML takes the second of two equal keys without an error. ruamel.yaml has none of the three.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

__all__ = ["dump_yaml", "parse_yaml"]


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML 1.2 document: mappings, lists and plain values. No Python object is ever made.

    Args:
        text: The document.
        source: Where it is from, for the message of an error.

    Raises:
        ValueError: `text` is not YAML, or a mapping has the same key twice.

    >>> parse_yaml("rate: 1e-3", "run.yaml")
    {'rate': 0.001}
    >>> parse_yaml("steps: 1\\nsteps: 2", "run.yaml")
    Traceback (most recent call last):
    ValueError: run.yaml, line 2: not valid YAML: found duplicate key "steps" with value "2" (original value: "1")
    """
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        # Not str(error): for a duplicate key that is ten lines long, with a way to allow it.
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        context = f"{error.context}: " if error.context and error.context != "while constructing a mapping" else ""
        raise ValueError(f"{source}{line}: not valid YAML: {context}{error.problem}") from error
    except YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{source}: not valid YAML: {error}") from error


def dump_yaml(value: Any) -> str:
    """A value as a YAML 1.2 document, for `parse_yaml`. Mappings keep their order.

    >>> print(dump_yaml({"seed": 0, "prompt": "1e-3", "rate": 1e-3}), end="")
    seed: 0
    prompt: '1e-3'
    rate: 0.001
    """
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def _yaml() -> YAML:
    # A new one for each document: an instance keeps state. pure: the C parser (libyaml) follows YAML 1.1.
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes are typed as their defaults, None
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # else the keys would be sorted
    yaml.width = 119
    return yaml
