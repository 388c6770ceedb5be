"""The run's configuration: one YAML file, typed. A wrong key or value is an error that names the way out."""

import copy
import difflib
import hashlib
import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from condft.retention.self_distillation import SelfDistillationConfig


class _Section(BaseModel):
    # strict: a quoted "10" where a number is wanted is a slip in the file, not something to guess at
    # finite: checkpoints and results keep the settings as JSON, which has no infinity
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The pre-trained parts and how they are put together."""

    language_model: str = Field(min_length=1, description="Folder or hub name of the causal LLM.")
    audio_tower: str = Field(min_length=1, description="Folder or hub name of the speech encoder.")
    prompt: str = Field(default="Transcribe the speech.", description="The user's words with the audio.")
    system_prompt: str | None = Field(
        default=None, description="The system's words. null = the chat template's own; an empty string = none."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Of the frozen weights.")
    trust_remote_code: bool = Field(default=False, description="Allow a checkpoint to run code of its own.")


class DataConfig(_Section):
    """Where clips come from: a JSONL manifest or a `datasets` dataset, exactly one of them."""

    manifest: str | None = Field(default=None, description="Path of a JSON Lines manifest, one object a clip.")
    dataset: str | None = Field(default=None, description="Folder or hub name of a `datasets` dataset.")
    dataset_config: str | None = Field(default=None, description="Which of the dataset's configurations.")
    dataset_split_train: str = Field(default="train", description="Split of the dataset to train on.")
    dataset_split_test: str = Field(default="test", description="Split of the dataset to measure on.")
    audio_column: str = Field(default="audio", description="Column of the dataset that holds the audio.")
    text_column: str = Field(default="text", description="Column that holds the reference transcription.")
    language_column: str | None = Field(default=None, description="Column of the language, for a WER each.")
    skip_bad: bool = Field(default=False, description="Count and report unreadable clips instead of stopping.")
    max_seconds: float | None = Field(default=None, gt=0, description="Longer clips are errors (or skipped).")

    @model_validator(mode="after")
    def _one_source_and_two_splits(self) -> "DataConfig":
        given = [name for name in ("manifest", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of data.manifest and data.dataset, not {given or 'none'}")
        if self.dataset_split_train == self.dataset_split_test:
            raise ValueError(
                f"data.dataset_split_train and data.dataset_split_test are both {self.dataset_split_test!r}: what is "
                "trained on cannot be the test too. Parts of a split have names such as 'train[:90%]'."
            )
        return self


class LearningRates(_Section):
    """One learning rate a component. Full-rank copies want smaller steps than LoRA; large ones forget more."""

    projector: float = Field(default=1e-3, gt=0, description="Of the projector, in both stages.")
    language_model: float = Field(default=1.5e-4, gt=0, description="Of the selected weights, in stage 2.")


class TrainingConfig(_Section):
    """The two stages and their optimizer."""

    projector_steps: int = Field(default=0, ge=0, description="Stage 1: the projector alone. 0 leaves it out.")
    steps: int = Field(ge=0, description="Stage 2: projector and the selected tensors. 0 leaves it out.")
    per_device_batch_size: int = Field(default=8, ge=1, description="Clips a micro-batch, on each process.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches an optimizer step.")
    group_by_length: bool = Field(default=True, description="Clips of similar length share a batch: less padding.")
    learning_rate: LearningRates = Field(default_factory=LearningRates)
    weight_decay: float = Field(default=0.0, ge=0, description="Of AdamW; 0 = none.")
    warmup_steps: int = Field(default=10, ge=0, description="Optimizer steps of linear warm-up, in each stage.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Of the gradient; null = no clipping.")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="auto = bf16 on a CUDA device that computes in it, else no."
    )
    self_distillation: SelfDistillationConfig | None = Field(default=None, description="null = none.")
    checkpoint_every: int = Field(default=0, ge=0, description="Optimizer steps; 0 = at the end of stages only.")
    keep_checkpoints: int = Field(default=2, ge=1, description="How many checkpoints stay; older ones are deleted.")
    log_every: int = Field(default=1, ge=1, description="Steps between TensorBoard points; metrics.jsonl has all.")

    @model_validator(mode="after")
    def _trains_something(self) -> "TrainingConfig":
        if self.projector_steps + self.steps == 0:
            raise ValueError("projector_steps and steps are both 0: nothing would be trained")
        return self

    def resolve_mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """What `auto` means here: bf16 on a CUDA device that computes in it, else fp32 (reproducible on a CPU)."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


class EvaluationConfig(_Section):
    """What was learned (WER) and what was forgotten (text cross-entropy, KL)."""

    per_device_batch_size: int = Field(default=16, ge=1, description="Clips a batch of encoding and transcribing.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of a transcription; null = 5/4 of the longest test reference, and 8."
    )
    num_clips: int | None = Field(default=None, ge=1, description="Test clips to measure on, drawn once; null = all.")
    text: str = Field(
        default="pydoc", min_length=1, description="Held-out: pydoc, wikitext, or the path of a text file."
    )
    text_tokens: int = Field(default=12_000, ge=2, description="Tokens of it to read, about.")
    context_length: int = Field(default=512, ge=2, description="Tokens a window of it.")
    sampled_sequences: int = Field(default=16, ge=1, description="Sequences sampled from the base, for the KL.")
    sampled_tokens: int = Field(default=96, ge=1, description="Tokens of each.")


class RunConfig(_Section):
    """Everything a run depends on. `tuning` holds the fields of `CondFTConfig`, checked there."""

    # Stages and processes count on from the seed, and numpy takes none from 2**32 on.
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of data order, projector, dropout and sampling.")
    output_dir: str = Field(min_length=1, description="Folder of the results.")
    model: ModelConfig
    data: DataConfig
    tuning: dict[str, Any] = Field(default_factory=dict, description="Fields of CondFTConfig.")
    training: TrainingConfig
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @field_validator("tuning", mode="before")
    @classmethod
    def _empty_tuning(cls, value: Any) -> Any:
        return {} if value is None else value  # `tuning:` with nothing below it is null in YAML

    @field_validator("tuning")
    @classmethod
    def _finite_tuning(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, setting in value.items():
            if isinstance(setting, float) and not math.isfinite(setting):
                raise ValueError(f"'tuning.{key}' is {setting}, expected a finite number")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, defaults filled in."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON without `output_dir`: a moved run is still the same run."""
        content = {key: value for key, value in self.to_dict().items() if key != "output_dir"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def diff(self, other: "RunConfig | Mapping[str, Any]") -> list[str]:
        """The dotted keys (without `output_dir`) whose values differ from `other`'s, sorted.

        Args:
            other: Another config, or its `to_dict()` as a checkpoint keeps it (perhaps of another version).
        """
        theirs = flatten(other.to_dict() if isinstance(other, RunConfig) else other)
        ours = flatten(self.to_dict())
        absent = object()
        keys = (ours.keys() | theirs.keys()) - {"output_dir"}
        return sorted(key for key in keys if ours.get(key, absent) != theirs.get(key, absent))


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys. An empty mapping stays as a value, so that it still compares."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads numbers and booleans as YAML 1.2 does.

    PyYAML follows 1.1, where `1e-3` is a string and `mixed_precision: no` is False: both traps of this very file.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file into a checked configuration.

    Args:
        path: The YAML file.
        overrides: Assignments such as `training.steps=10`, their values read as YAML, put in place of the file's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not YAML, a key that stands twice, an unknown key (with the closest valid name), a missing key,
            or a value of the wrong type or range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; the ones that ship with condft lie in configs/")
    content = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    for assignment in overrides:
        content = override(content, assignment)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems)) from error


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with stricter rules
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error


def override(content: dict[str, Any], assignment: str) -> dict[str, Any]:
    """A copy of a file's content with one setting in place of the file's.

    Args:
        content: Sections as read from YAML.
        assignment: Such as `training.steps=10`; the value is read as YAML.

    Raises:
        ValueError: Not an assignment, or into what is no section.
    """
    key, equals, value = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {assignment!r} is not of the form section.key=value")
    content = copy.deepcopy(content)
    *sections, last = key.split(".")
    at = content
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise ValueError(f"override {assignment!r}: {section!r} holds a value, not a section")
    at[last] = _parse(value, f"override {assignment!r}")
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
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key!r} is {problem['input']!r} ({type(problem['input']).__name__}), expected {expected}"


def _valid_names(sections: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        annotation = model.model_fields[section].annotation
        (model,) = (kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))
    return sorted(model.model_fields)
