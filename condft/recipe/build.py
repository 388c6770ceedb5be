"""Builds what a run needs from its configuration: clips, the composed audio LLM, and the CondFT config."""

import dataclasses
import difflib
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from condft.report import SpectralReport
from condft.tasks.speech import (
    Clip,
    SkippedClip,
    SpeechCollator,
    SpeechDataError,
    SpeechExample,
    compose_audio_llm,
    compute_features,
    describe_skipped,
    encoder_window,
    load_manifest,
    load_speech_dataset,
    longest_seconds,
    make_examples,
)
from condft.tasks.speech.wer import normalize
from condft.training import RunConfig
from condft.training.config import DataConfig
from condft.tuner import CondFTConfig

__all__ = [
    "Speech",
    "compose",
    "load_speech",
    "tuning_config",
    "usable_examples",
    "window_of",
]

logger = logging.getLogger(__name__)

_SPLITS = ("train", "test")
_LANGUAGE_MODEL_WEIGHTS = r"model\.language_model\.layers\..*"
_PROJECTOR = "multi_modal_projector"
# Filled in by the method itself or set by the recipe; a YAML has no say in them.
_NOT_CONFIGURABLE = {"report", "report_fingerprint", "peft_type", "auto_mapping", "peft_version", "inference_mode"}


@dataclass(frozen=True)
class Speech:
    """The clips of a run, and where those stood that were left out as unusable (only under `data.skip_bad`)."""

    train: list[Clip]
    test: list[Clip]
    skipped: frozenset[str] = frozenset()

    @property
    def num_skipped(self) -> int:
        """How many clips were left out."""
        return len(self.skipped)

    def without(self, bad_train: Sequence[SkippedClip], bad_test: Sequence[SkippedClip]) -> "Speech":
        """The same, with more of each split's clips left out."""
        gone_train, gone_test = ({skip.source for skip in bad} for bad in (bad_train, bad_test))
        return Speech(
            [clip for clip in self.train if clip.source not in gone_train],
            [clip for clip in self.test if clip.source not in gone_test],
            self.skipped | gone_train | gone_test,
        )

    @property
    def longest_seconds(self) -> float:
        """Length of the longest clip; the tower's window must cover it."""
        return longest_seconds([*self.train, *self.test])

    @property
    def unheard_voices(self) -> bool:
        """Whether every clip names its speaker, and none of the test split's speaks in the training split."""
        train, test = ({clip.speaker for clip in clips} for clips in (self.train, self.test))
        return None not in train | test and train.isdisjoint(test)


def load_speech(data: DataConfig, *, num_test_clips: int | None = None, window: float = math.inf) -> Speech:
    """Loads and checks both splits.

    Args:
        data: Where from.
        num_test_clips: Keep that many test clips, drawn once and for all; None keeps all.
        window: Seconds of the longest clip that the encoder takes, a bound beside `data.max_seconds`.

    Raises:
        SpeechDataError: A bad clip (unless `data.skip_bad`), or an empty split.
        FileNotFoundError: No such manifest.
    """
    longest = min(window, math.inf if data.max_seconds is None else data.max_seconds)
    loaded = {split: _load_split(data, split, longest) for split in _SPLITS}
    for split, speech in loaded.items():
        if speech.skipped:
            logger.warning("%s: %s", split, describe_skipped(speech.skipped))
    test = loaded["test"].clips
    if num_test_clips is not None and num_test_clips < len(test):
        # Drawn, not every n-th: manifests alternate languages, and a stride would take one of them only.
        test = [test[index] for index in sorted(random.Random(0).sample(range(len(test)), num_test_clips))]
    # Both of ours may read one file, or one split of a dataset: a clip skipped twice still counts once.
    skipped = frozenset(skip.source for speech in loaded.values() for skip in speech.skipped)
    return Speech(loaded["train"].clips, test, skipped)


def _load_split(data: DataConfig, split: str, max_seconds: float) -> Any:
    if data.manifest is not None:
        return load_manifest(data.manifest, split=split, max_seconds=max_seconds, skip_bad=data.skip_bad)
    from datasets import load_dataset

    own = data.dataset_split_train if split == "train" else data.dataset_split_test
    return load_speech_dataset(
        load_dataset(data.dataset, data.dataset_config, split=own),
        name=f"{data.dataset}[{own}]",
        audio_column=data.audio_column,
        text_column=data.text_column,
        language_column=data.language_column,
        max_seconds=max_seconds,
        skip_bad=data.skip_bad,
    )


def window_of(config: RunConfig) -> int:
    """Seconds of the longest clip that the run's encoder takes.

    Raises:
        FileNotFoundError: Its checkpoint is neither a folder nor to be had from the hub.
    """
    _check_checkpoint("model.audio_tower", config.model.audio_tower, config.model.trust_remote_code)
    return encoder_window(config.model.audio_tower)


def compose(config: RunConfig, *, max_seconds: float) -> tuple[nn.Module, Any]:
    """The audio LLM and its processor, with the configured parts, dtype and projector seed.

    Raises:
        FileNotFoundError: A checkpoint is neither a folder nor to be had from the hub.
        ValueError: The parts do not go together.
    """
    for key in ("audio_tower", "language_model"):
        _check_checkpoint(f"model.{key}", getattr(config.model, key), config.model.trust_remote_code)
    return compose_audio_llm(
        config.model.audio_tower,
        config.model.language_model,
        max_seconds=max_seconds,
        seed=config.seed,
        dtype=getattr(torch, config.model.dtype),
        trust_remote_code=config.model.trust_remote_code,
    )


def _check_checkpoint(key: str, name: str, trust_remote_code: bool) -> None:
    """Names the setting: offline, the loading libraries only say that some hub did not answer."""
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"{key}={name!r} is neither a checkpoint folder here nor to be had from the hub. "
            "scripts/data/get_models.py puts the quickstart's two checkpoints into models/."
        ) from error


def usable_examples(
    model: nn.Module, collator: SpeechCollator, clips: list[Clip], config: RunConfig, *, skip_bad: bool, compared: bool
) -> tuple[list[SpeechExample], list[SkippedClip]]:
    """Clips with their tower features, computed at most once for each tower and clip.

    Each is looked at whether a batch can hold it: now, and not when its turn comes.

    Args:
        model: The composed model.
        collator: Of the batches.
        clips: Of one split.
        config: The run.
        skip_bad: Leave unusable clips out, and log them.
        compared: Their texts are references of a word error rate, and need a word.

    Returns:
        The examples, at least one, and what was left out.

    Raises:
        SpeechDataError: An unusable clip (unless `skip_bad`), or no usable one.
    """
    skipped: list[SkippedClip] = []
    size = config.evaluation.per_device_batch_size
    features = compute_features(
        model, collator.processor, clips, batch_size=size, skipped=skipped if skip_bad else None
    )
    gone = {skip.source for skip in skipped}
    usable = []
    for example in make_examples([clip for clip in clips if clip.source not in gone], features):
        problem = collator.problem_of(example)
        if problem is None and compared and not normalize(example["text"]):
            problem = f"the text {example['text']!r} has no word to compare with"
        if problem is None:
            usable.append(example)
        elif skip_bad:
            skipped.append(SkippedClip(example["source"], problem))
        else:
            raise SpeechDataError(f"{example['source']}: {problem}")
    if skipped:
        logger.warning("%s", describe_skipped(skipped))
    if not usable:
        raise SpeechDataError(f"no clip of {len(clips)} can be used; {describe_skipped(skipped)}")
    return usable, skipped


def tuning_config(tuning: Mapping[str, Any], *, seed: int, report: SpectralReport | None = None) -> CondFTConfig:
    """The `tuning` section as a `CondFTConfig`: the language model's weights are candidates, the projector trains.

    Args:
        tuning: Fields of `CondFTConfig`.
        seed: Of `order: random`, unless `tuning` has one.
        report: A spectral report of the composed model, to select from.

    Raises:
        ValueError: An unknown field (with the closest valid name), or a value that `CondFTConfig` refuses.
    """
    names = sorted({field.name for field in dataclasses.fields(CondFTConfig)} - _NOT_CONFIGURABLE)
    for key in tuning:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean 'tuning.{close[0]}'?" if close else f"valid: {', '.join(names)}"
            raise ValueError(f"unknown key 'tuning.{key}'; {hint}")
    defaults = {"target_modules": _LANGUAGE_MODEL_WEIGHTS, "modules_to_save": [_PROJECTOR], "seed": seed}
    return CondFTConfig(**{**defaults, **tuning, "report": report})
