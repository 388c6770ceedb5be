"""The data of a run: the clips of both splits, loaded and checked, and the examples that batches are made of."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from condft.recipe.checks import check_text, warn_of_cut_answers
from condft.tasks.speech import (
    Clip,
    SkippedClip,
    SpeechCollator,
    SpeechDataError,
    SpeechExample,
    compute_features,
    load_manifest,
    load_speech_dataset,
    make_examples,
)
from condft.tasks.speech.clips import describe_skipped, longest_seconds
from condft.tasks.speech.wer import normalize
from condft.training import RunConfig
from condft.training.config import DataConfig

__all__ = ["RunData", "SpeechSplits", "load_speech", "prepare_data", "usable_examples"]

logger = logging.getLogger(__name__)

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class SpeechSplits:
    """The clips of a run.

    Attributes:
        train: Those to learn from.
        test: Those to measure on.
        skipped: Sources (`manifest.jsonl:12`) of unusable clips that were left out; only under `data.skip_bad`.
    """

    train: list[Clip]
    test: list[Clip]
    skipped: frozenset[str] = frozenset()

    @property
    def num_skipped(self) -> int:
        """How many clips were left out."""
        return len(self.skipped)

    def without(self, bad_train: Sequence[SkippedClip], bad_test: Sequence[SkippedClip]) -> "SpeechSplits":
        """The same splits, with more clips of each left out."""
        gone_train, gone_test = ({skip.source for skip in bad} for bad in (bad_train, bad_test))
        return SpeechSplits(
            [clip for clip in self.train if clip.source not in gone_train],
            [clip for clip in self.test if clip.source not in gone_test],
            self.skipped | gone_train | gone_test,
        )

    @property
    def longest_seconds(self) -> float:
        """Length of the longest clip. The tower's window must cover it."""
        return longest_seconds([*self.train, *self.test])

    @property
    def has_new_speakers(self) -> bool:
        """Whether every clip names its speaker, and no speaker of the test split is in the training split."""
        train, test = ({clip.speaker for clip in clips} for clips in (self.train, self.test))
        return None not in train | test and train.isdisjoint(test)


@dataclass(frozen=True)
class RunData:
    """What a run trains and measures on. It does not hold the model, so that the model can be freed.

    Attributes:
        processor: The composed model's processor.
        collator: Makes batches of examples.
        train: Examples of the training split, with their tower features.
        test: Examples of the test split.
        speech: The clips that the examples were made of.
    """

    processor: Any
    collator: SpeechCollator
    train: list[SpeechExample]
    test: list[SpeechExample]
    speech: SpeechSplits

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.processor.tokenizer


def load_speech(data: DataConfig, *, num_test_clips: int | None = None, window: float = math.inf) -> SpeechSplits:
    """Loads and checks both splits.

    Args:
        data: Where the clips come from.
        num_test_clips: Keep this many test clips, always the same ones; None keeps all.
        window: Longest clip that the encoder takes, in seconds. `data.max_seconds` may set a lower bound.

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
        # Drawn at random, not every n-th: manifests alternate languages, and a stride could take only one of them.
        # The seed is fixed, so that runs of different seeds are measured on the same clips.
        test = [test[index] for index in sorted(random.Random(0).sample(range(len(test)), num_test_clips))]
    # A set: both splits may come from one file, and a clip that is skipped in both counts once.
    skipped = frozenset(skip.source for speech in loaded.values() for skip in speech.skipped)
    return SpeechSplits(loaded["train"].clips, test, skipped)


def _load_split(data: DataConfig, split: str, max_seconds: float) -> Any:
    if data.manifest is not None:
        return load_manifest(data.manifest, split=split, max_seconds=max_seconds, skip_bad=data.skip_bad)
    from datasets import load_dataset  # takes seconds to import, and a manifest does not need it

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


def prepare_data(model: nn.Module, processor: Any, speech: SpeechSplits, config: RunConfig) -> RunData:
    """The examples of both splits with their tower features, and all checks that need only the base model.

    Args:
        model: The composed model, on the device that computes the features.
        processor: Its processor.
        speech: The loaded clips.
        config: The run.

    Raises:
        SpeechDataError: An unusable clip (unless `data.skip_bad`), or no usable one.
        ValueError: The held-out text does not fit the model; see `check_text`.
    """
    collator = SpeechCollator.for_model(
        model, processor, prompt=config.model.prompt, system_prompt=config.model.system_prompt
    )
    # The cheap check first: features of many clips take minutes.
    check_text(processor.tokenizer, config.evaluation, max_length=collator.max_length)
    skip_bad = config.data.skip_bad
    train, bad_train = usable_examples(model, collator, speech.train, config, skip_bad=skip_bad, compared=False)
    test, bad_test = usable_examples(model, collator, speech.test, config, skip_bad=skip_bad, compared=True)
    warn_of_cut_answers(collator, test, config.evaluation)
    return RunData(processor, collator, train, test, speech.without(bad_train, bad_test))


def usable_examples(
    model: nn.Module, collator: SpeechCollator, clips: list[Clip], config: RunConfig, *, skip_bad: bool, compared: bool
) -> tuple[list[SpeechExample], list[SkippedClip]]:
    """Clips with their tower features, which are computed at most once for each tower and clip.

    Every example is checked here, so that a run does not fail when a bad example's turn comes, hours later.

    Args:
        model: The composed model.
        collator: Makes batches of the examples.
        clips: The clips of one split.
        config: The run.
        skip_bad: Leave unusable clips out, and log them.
        compared: The texts are references of a word error rate, so each needs a word.

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
        problem = _problem_of(example, collator, compared=compared)
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


def _problem_of(example: SpeechExample, collator: SpeechCollator, *, compared: bool) -> str | None:
    """Why an example cannot be used, or None."""
    problem = collator.problem_of(example)
    if problem is None and compared and not normalize(example["text"]):
        # "...!" is empty after normalization, and a word error rate divides by the number of reference words.
        return f"the text {example['text']!r} has no word to compare with"
    return problem
