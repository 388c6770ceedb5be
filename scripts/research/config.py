"""A study's YAML, typed: one task, its measurements, and the arms with their learning rates.

Two words of the study: an **arm** is one way to train (a selection rule, or a peer method such as LoRA); a **level**
is a value of the test loss at which the forgetting of all arms is compared.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from condft.files.yaml import parse_yaml
from condft.training import TrainingConfig
from condft.training.config import EvaluationConfig
from condft.training.config_file import override

# Part of every key. Raise it when the harness trains or measures in another way: old runs then do not count.
HARNESS_VERSION = 2

# Settings that decide which runs there are and how they are read, but not what a run measures.
_NOT_IN_KEYS = {"results", "workspace", "seeds", "levels", "arms", "best_by", "final_seeds"}
# Settings that have another name in the keys of the committed runs: a new name must not make a run a new one.
_NAMES_IN_KEYS = {
    "sampled_sequences": "self_generated_sequences",
    "sampled_tokens": "self_generated_tokens",
}
DISTILLED = "_distilled"
"""Suffix of the names of arms that are trained with self-distillation."""
_SEED = "{seed}"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeechSection(_Section):
    """Task (a): a text LLM learns to transcribe."""

    audio_tower: str
    manifest: str
    projector_rate: float = Field(gt=0, description="Of the projector, in both stages and in all arms.")
    prompt: str = "Transcribe."
    system_prompt: str | None = ""


class TextSection(_Section):
    """Tasks (b) and (c): an LLM reads another language."""

    file: str = Field(description="UTF-8 prose; scripts/data/get_german.py makes one.")
    window: int = Field(default=128, ge=8, description="Tokens of a training example.")
    test_windows: int = Field(default=64, ge=1, description="Held out: the last ones of the file.")


class ArmSection(_Section):
    """One arm: its learning rates and whether it runs early. `study/arms.py` has its builder."""

    rates: list[float] = Field(min_length=1, description="Rates of the sweep; the middle one runs first.")
    main: bool = Field(default=False, description="Part of the main comparison, so it runs before the others.")


class StudyConfig(_Section):
    """Everything that the study's runs depend on.

    Attributes:
        results: The JSONL that all runs append to.
        workspace: Folder of what runs share (projector stages, base measurements, locks); may be deleted.
        language_model: Folder or hub name. With `{seed}` in it every seed has a base of its own, on which it sweeps
            all rates: the base then varies over seeds too.
        trainable_fraction: Budget of the arms that select, of the language model's layer weights.
        training: Of stage 1 (`projector_steps`) and stage 2 (`steps`). Arms whose names end in `_distilled` take
            `self_distillation`, and no others.
        evaluation: `text_tokens` is what every point reads; `final_text_tokens` the end of a run.
        points: Steps of stage 2 after which a run is measured (its evaluation points).
        wer_points: Those of them at which it transcribes too.
        seeds: Of data order, projector start and random arms. With one base for all, only the first seed sweeps the
            learning rates.
        levels: Test losses at which forgetting is compared, each arm at the rate of its sweep that is best there.
        best_by: The measure of forgetting that decides which rate is best.
        final_seeds: Seeds whose runs are measured on the longer text at their end; null for all.
    """

    speech: SpeechSection | None = None
    text: TextSection | None = None
    results: str
    workspace: str
    language_model: str
    trainable_fraction: float = Field(gt=0, le=1)
    training: TrainingConfig
    evaluation: EvaluationConfig
    final_text_tokens: int = Field(ge=2)
    points: list[int] = Field(min_length=1)
    wer_points: list[int] = Field(default_factory=list)
    seeds: list[int] = Field(min_length=1)
    levels: list[float] = Field(min_length=1)
    best_by: Literal["text_ce_change", "kl_to_base"] = "text_ce_change"
    final_seeds: list[int] | None = None
    arms: dict[str, ArmSection]

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if (self.speech is None) == (self.text is None):
            raise ValueError("give exactly one of the sections speech and text")
        if self.points != sorted(set(self.points)) or self.points[0] < 1 or self.points[-1] != self.training.steps:
            raise ValueError(f"points {self.points} must rise from 1 or later to training.steps={self.training.steps}")
        if not set(self.wer_points) <= set(self.points):
            raise ValueError(f"wer_points {self.wer_points} are not all among the points {self.points}")
        distilled = [name for name in self.arms if name.endswith(DISTILLED)]
        if distilled and self.training.self_distillation is None:
            raise ValueError(f"the arm {distilled[0]} needs training.self_distillation")
        return self

    @property
    def own_bases(self) -> bool:
        """Whether every seed has a base of its own."""
        return _SEED in self.language_model

    @property
    def sweep_seeds(self) -> list[int]:
        """The seeds that run every rate of every arm."""
        return self.seeds if self.own_bases else self.seeds[:1]

    def of(self, arm: str, seed: int) -> "StudyConfig":
        """The settings of an arm's runs from a seed: with the seed's base, and self-distillation in its arms only."""
        distillation = self.training.self_distillation if arm.endswith(DISTILLED) else None
        return self.model_copy(
            update={
                "language_model": self.language_model.replace(_SEED, str(seed)),
                "training": self.training.model_copy(update={"self_distillation": distillation}),
            }
        )

    def determining(self) -> dict[str, Any]:
        """The settings that determine a run's figures, as plain JSON; not those that list or present runs."""
        content = self.model_dump(mode="json", exclude=_NOT_IN_KEYS)
        content["evaluation"] = {
            _NAMES_IN_KEYS.get(name, name): value for name, value in content["evaluation"].items()
        }
        if self.training.self_distillation is None:
            del content["training"]["self_distillation"]  # runs older than this setting have no such entry
        if self.text is not None:
            content["evaluation"]["max_new_tokens"] = (
                24  # a text study transcribes nothing; the committed keys have this value
            )
        return {**content, "harness_version": HARNESS_VERSION}

    def digest(self) -> str:
        """16 hex digits over `determining()`."""
        return digest_of(self.determining())


def digest_of(content: Any) -> str:
    """16 hex digits over the canonical JSON of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Reads and checks a study's YAML.

    Args:
        path: The YAML.
        overrides: Assignments such as `seeds=[3]`, which replace the file's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A value or key that does not belong; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study {path}; the ones that ship with condft lie in configs/study/")
    try:
        content = reduce(override, overrides, parse_yaml(path.read_text(encoding="utf-8"), str(path)))
        return StudyConfig.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems)) from error
