"""The configuration of a run: typed sections, each value checked.

Each field's description is its documentation: docs/reference/yaml.md is made from them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from condft.files.yaml import dump_yaml
from condft.retention.self_distillation import SelfDistillationConfig


class _Section(BaseModel):
    # strict: a quoted "10" instead of a number is a mistake in the file, and is not converted.
    # finite: checkpoints and results keep the settings as JSON, which has no infinity.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The pre-trained parts, and the prompt that joins them."""

    language_model: str = Field(min_length=1, description="Folder or hub name of the causal LLM.")
    audio_tower: str = Field(min_length=1, description="Folder or hub name of the speech encoder, a Whisper.")
    prompt: str = Field(default="Transcribe the speech.", description="The user's text after the audio.")
    system_prompt: str | None = Field(
        default=None, description="The system's text. null leaves it to the chat template, an empty text removes it."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Dtype of the frozen weights. What trains is always float32."
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether code that is shipped with a checkpoint may run."
    )


class DataConfig(_Section):
    """The clips: a JSON Lines manifest or a `datasets` dataset, exactly one of them."""

    manifest: str | None = Field(
        default=None, description="Path of a JSON Lines manifest: audio, text and split of each clip."
    )
    dataset: str | None = Field(default=None, description="Folder or hub name of a `datasets` dataset.")
    dataset_config: str | None = Field(default=None, description="Name of one of the dataset's configurations.")
    dataset_split_train: str = Field(default="train", description="The dataset's split to train on.")
    dataset_split_test: str = Field(default="test", description="The dataset's split to measure on.")
    audio_column: str = Field(default="audio", description="The dataset's column with the recordings.")
    text_column: str = Field(default="text", description="The dataset's column with the transcriptions.")
    language_column: str | None = Field(
        default=None, description="The dataset's column with the languages; null if it has none."
    )
    skip_bad: bool = Field(
        default=False, description="Whether unusable clips are left out and counted. Otherwise they stop the run."
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="Longest clip allowed, in seconds. Longer clips are unusable. null = no limit."
    )

    @model_validator(mode="after")
    def _one_source_and_two_splits(self) -> "DataConfig":
        given = [name for name in ("manifest", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of data.manifest and data.dataset, not {given or 'none'}")
        if self.dataset_split_train == self.dataset_split_test:
            raise ValueError(
                f"data.dataset_split_train and data.dataset_split_test are both {self.dataset_split_test!r}: a "
                "run cannot be tested on its training data. Parts of a split have names such as 'train[:90%]'."
            )
        return self


class LearningRates(_Section):
    """The peak learning rate of each component. Full-rank copies need smaller rates than LoRA; large rates forget."""

    projector: float = Field(default=1e-3, gt=0, description="Peak learning rate of the projector.")
    language_model: float = Field(
        default=1.5e-4, gt=0, description="Peak learning rate of the language model's selected weights."
    )


class TrainingConfig(_Section):
    """The two stages of training and their optimizer, AdamW.

    >>> TrainingConfig(steps=200, warmup_steps=20).schedule
    'cosine'
    """

    projector_steps: int = Field(
        default=0, ge=0, description="Optimizer steps of stage 1, the projector alone. 0 leaves the stage out."
    )
    steps: int = Field(
        ge=0, description="Optimizer steps of stage 2, projector and selected weights. 0 leaves the stage out."
    )
    per_device_batch_size: int = Field(
        default=8, ge=1, description="Clips on one device in one forward and backward pass."
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Forward and backward passes for each optimizer step."
    )
    group_by_length: bool = Field(
        default=True, description="Whether clips of similar length share a batch, which saves padding."
    )
    learning_rate: LearningRates = Field(
        default_factory=LearningRates, description="Peak learning rate of each component."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    warmup_steps: int = Field(
        default=10, ge=0, description="Optimizer steps of linear warm-up at the start of each stage."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up."
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are clipped to this norm. null = no clipping."
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="Precision of the computation. auto = bf16 on a GPU that supports it, else no."
    )
    self_distillation: SelfDistillationConfig | None = Field(
        default=None, description="Settings of self-distillation. {} = its defaults, null = none."
    )
    checkpoint_every: int = Field(
        default=0, ge=0, description="Optimizer steps between checkpoints. 0 = only at the end of each stage."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Number of newest checkpoints that are kept.")
    log_every: int = Field(
        default=1, ge=1, description="Optimizer steps between TensorBoard points. metrics.jsonl has every step."
    )

    @model_validator(mode="after")
    def _trains_something(self) -> "TrainingConfig":
        if self.projector_steps + self.steps == 0:
            raise ValueError("projector_steps and steps are both 0: nothing would be trained")
        return self

    def resolve_mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """`mixed_precision` with `auto` decided: bf16 on a CUDA device that supports it, else no (fp32)."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


class EvaluationConfig(_Section):
    """How to measure what was learned (word error rate) and forgotten (text cross-entropy, KL to the base)."""

    per_device_batch_size: int = Field(
        default=16, ge=1, description="Clips on one device in one batch of transcriptions."
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest transcription, in tokens. null = 5/4 of the longest test reference, plus 8.",
    )
    num_clips: int | None = Field(
        default=None, ge=1, description="Test clips to measure on, drawn at random once. null = all."
    )
    text: str = Field(
        default="pydoc",
        min_length=1,
        description="Held-out text for the cross-entropy: pydoc, wikitext, or the path of a text file.",
    )
    text_tokens: int = Field(default=12_000, ge=2, description="About how many tokens of the held-out text are read.")
    context_length: int = Field(default=512, ge=2, description="Tokens of a window of the held-out text.")
    sampled_sequences: int = Field(
        default=16, ge=1, description="Texts sampled from the base, on which the KL is measured."
    )
    sampled_tokens: int = Field(default=96, ge=1, description="Tokens of each sampled text.")


class RunConfig(_Section):
    """Everything that a run depends on, as read from YAML by `load_config`.

    >>> from condft.training import load_config
    >>> config = load_config("run.yaml", ["training.steps=3"])
    >>> config.training.steps
    3
    >>> config.diff(load_config("run.yaml"))
    ['training.steps']
    """

    # Stages and processes add small numbers to the seed, and numpy's seeds end at 2**32.
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of data order, projector, dropout and sampling.")
    output_dir: str = Field(min_length=1, description="Folder for everything that the run writes.")
    model: ModelConfig = Field(description="The pre-trained parts.")
    data: DataConfig = Field(description="The clips.")
    tuning: dict[str, Any] = Field(
        default_factory=dict, description="Fields of CondFTConfig: which of the language model's weights train."
    )
    training: TrainingConfig = Field(description="Stages and optimizer.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="What is measured.")

    @field_validator("tuning", mode="before")
    @classmethod
    def _empty_tuning(cls, value: Any) -> Any:
        return {} if value is None else value  # `tuning:` with nothing below it is null in YAML

    @field_validator("tuning")
    @classmethod
    def _finite_tuning(cls, value: dict[str, Any]) -> dict[str, Any]:
        # allow_inf_nan covers typed fields only, not the values of this dict, whose types CondFTConfig knows.
        for key, setting in value.items():
            if isinstance(setting, float) and not math.isfinite(setting):
                raise ValueError(f"'tuning.{key}' is {setting}, expected a finite number")
        return value

    def to_dict(self) -> dict[str, Any]:
        """All settings, including defaults, as plain JSON types."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """All settings, including defaults, as YAML that `load_config` reads back as the same configuration."""
        return dump_yaml(self.to_dict())

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the canonical JSON without `output_dir`: a moved run is still the same run."""
        content = {key: value for key, value in self.to_dict().items() if key != "output_dir"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def diff(self, other: "RunConfig | Mapping[str, Any]") -> list[str]:
        """The dotted keys (without `output_dir`) whose values differ from `other`'s, sorted.

        Args:
            other: Another config, or its `to_dict()` from a checkpoint, which another version may have written.
        """
        theirs = flatten(other.to_dict() if isinstance(other, RunConfig) else other)
        ours = flatten(self.to_dict())
        absent = object()
        keys = (ours.keys() | theirs.keys()) - {"output_dir"}
        return sorted(key for key in keys if ours.get(key, absent) != theirs.get(key, absent))


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys. An empty mapping is a value, so that it is compared too.

    >>> flatten({"seed": 0, "training": {"steps": 3}, "tuning": {}})
    {'seed': 0, 'training.steps': 3, 'tuning': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
