"""A run's configuration from its YAML file. A wrong key or value is an error that names what is valid."""

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from condft.files.yaml import parse_yaml
from condft.training.config import RunConfig

__all__ = ["load_config", "override"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file into a checked configuration.

    Args:
        path: The YAML file (YAML 1.2).
        overrides: Assignments such as `training.steps=10`, which replace the file's values. The values are YAML too.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not YAML or has a key twice; a key is unknown (the message names the closest valid one)
            or missing; a value has the wrong type or range. All problems are named in one message.

    >>> config = load_config("run.yaml", overrides=["seed=1", "training.learning_rate.projector=2e-3"])
    >>> config.seed, config.training.learning_rate.projector
    (1, 0.002)
    >>> load_config("run.yaml", overrides=["training.stepz=10"])
    Traceback (most recent call last):
    ValueError: run.yaml: unknown key 'training.stepz'; did you mean 'training.steps'?
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; those that condft ships are in configs/")
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    for assignment in overrides:
        content = override(content, assignment)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems)) from error


def override(content: dict[str, Any], assignment: str) -> dict[str, Any]:
    """A copy of a file's content with one setting replaced or added.

    Args:
        content: Sections as read from YAML.
        assignment: Such as `training.steps=10`. The value is read as YAML.

    Raises:
        ValueError: `assignment` has no `=`, or its key goes through a value that is not a section.

    >>> override({"training": {"steps": 3}}, "training.warmup_steps=1")
    {'training': {'steps': 3, 'warmup_steps': 1}}
    """
    key, equals, value = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {assignment!r} is not of the form section.key=value")
    content = copy.deepcopy(content)
    *sections, last = key.split(".")
    at = content
    for section in sections:
        # A section with nothing below it is null in YAML, and counts as an empty one.
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise ValueError(f"override {assignment!r}: {section!r} holds a value, not a section")
    at[last] = parse_yaml(value, f"override {assignment!r}")
    return content


def _explain(problem: Any) -> str:
    """One pydantic error as a sentence with the dotted key, the value, and what was expected."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        names = _valid_names(location[:-1])
        close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])!r}?" if close else f"valid: {', '.join(names)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "invalid_key":
        return f"key {problem['input']!r} is not a string"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key!r} is {problem['input']!r} ({type(problem['input']).__name__}), expected {expected}"


def _valid_names(sections: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        annotation = model.model_fields[section].annotation
        # An optional section is annotated as `Section | None`.
        (model,) = (kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))
    return sorted(model.model_fields)
