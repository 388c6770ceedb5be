"""The pages of the options: fields of `CondFTConfig`, and the YAML of a run from its pydantic models."""

import dataclasses
import inspect
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from condft.training import RunConfig
from condft.tuner import CondFTConfig
from scripts.docs.markdown import GENERATED, prose_of, table

__all__ = ["GROUPS", "config_page", "rows_of", "yaml_page"]

GROUPS: dict[str, tuple[str, ...]] = {
    "Which weights may be chosen": (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "include_roles",
        "granularity",
    ),
    "Budget: at most one": ("num_tensors", "trainable_fraction", "max_condition_number"),
    "Rule": ("score", "order", "stratify", "seed"),
    "What else trains": (
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    ),
    "Where the selection comes from": ("report", "target_units"),
    "Memory and tests": ("offload_base", "init_weights"),
    "Filled in by condft": ("report_fingerprint", "selected_by", "base_digests", "condft_note"),
}

_CONFIG_INTRO = """`CondFTConfig` says what trains. Give it to `get_peft_model(model, CondFTConfig(...))`, or write its
fields into the `tuning:` section of a recipe's YAML. An adapter's folder keeps it as `adapter_config.json`.

A unit is a whole weight, one expert of a fused stack, or one attention head. Low condition number trains, high
condition number is frozen. Without any budget 100 units train, as in the paper.
[Choose a budget](../how-to/choose-a-budget.md) shows how to decide;
[Scores and controls](../explanation/scores-and-controls.md) explains the rules.

For the class itself see [the API](api/condft.tuner.md)."""

_PEFT_INTRO = """These mean what they mean in every PEFT method: `task_type`, `base_model_name_or_path`, `revision`,
`inference_mode`, `peft_type`, `auto_mapping` and `peft_version`."""

_YAML_INTRO = """One YAML file describes one run of the recipe: `condft train run.yaml`, or `scripts/train.py` under
`accelerate launch`. `configs/quickstart.yaml` is a complete example; `condft train quickstart.yaml` finds it by its
name. A key on the command line overrides the file's: `training.steps=60 output_dir=runs/short`.

The file is read strictly. An unknown key, a key that occurs twice, a value of another type and a number out of range
are errors that name the key and the closest valid one. Numbers and booleans are those of YAML 1.2: `1e-3` is a number,
and `no` is a string."""


def config_page() -> str:
    """Every argument of `CondFTConfig`, in groups, with its default and its meaning."""
    fields = {field.name: field for field in dataclasses.fields(CondFTConfig)}
    meanings = _arguments(CondFTConfig)
    parts = ["# CondFTConfig", GENERATED, _CONFIG_INTRO]
    for title, names in GROUPS.items():
        rows = [[f"`{name}`", f"`{_default_of(fields[name])}`", meanings[name]] for name in names]
        parts += [f"## {title}", table(["argument", "default", "meaning"], rows)]
    return "\n\n".join([*parts, "## PEFT's own", _PEFT_INTRO]) + "\n"


def yaml_page() -> str:
    """Every key of a run's YAML, section by section."""
    parts = ["# YAML of the recipe", GENERATED, _YAML_INTRO]
    for path, model in _sections(RunConfig, ""):
        title = f"`{path}`" if path else "The run"
        parts += [f"## {title}", prose_of(model.__doc__)]
        rows = rows_of(model, f"{path}." if path else "")
        if rows:
            parts.append(table(["key", "type", "default", "meaning"], rows))
    return "\n\n".join(parts) + "\n"


def rows_of(model: type[BaseModel], prefix: str) -> list[list[str]]:
    """Key, type, default and meaning of every field of a section that is no section itself.

    Raises:
        ValueError: A field has no description.
    """
    rows = []
    for name, field in model.model_fields.items():
        if _model_in(field.annotation) is None:
            if not field.description:
                raise ValueError(f"{model.__name__}.{name} has no description: give its Field one")
            rows.append([f"`{prefix}{name}`", _type_of(field), _yaml_default(field), field.description])
    return rows


def _arguments(kind: type) -> dict[str, str]:
    """Argument -> meaning, from the `Args:` of a docstring in Google's style."""
    section = (inspect.getdoc(kind) or "").split("Args:\n", 1)[1]
    section = re.split(r"\n\n(?=\S)", section)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _default_of(field: dataclasses.Field[Any]) -> str:
    if field.name == "condft_note":
        return "a sentence"
    return repr(field.default).replace("'", '"')


def _sections(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """The sections of a YAML, outer ones first, in the order of their fields."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            found += _sections(inner, f"{path}.{name}" if path else name)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _type_of(field: FieldInfo) -> str:
    return _name_of(field.annotation) + "".join(_bounds(field))


def _name_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if kind is type(None) else _name_of(kind) for kind in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "a section"
    return {"str": "string", "int": "whole number", "float": "number", "bool": "true or false"}[annotation.__name__]


def _bounds(field: FieldInfo) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [(name, getattr(rule, name)) for rule in field.metadata for name in signs if hasattr(rule, name)]
    return [f", {signs[name]} {limit}" for name, limit in limits]


def _yaml_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    names = {None: "null", True: "true", False: "false"}
    return f"`{names[default] if isinstance(default, bool | None) else default}`"
