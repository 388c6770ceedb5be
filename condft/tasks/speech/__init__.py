"""Speech beside text: compose an audio LLM of pre-trained parts, load clips, encode them once, make batches."""

from condft.tasks.speech.collate import IGNORE_INDEX, SpeechCollator, SpeechExample, make_examples
from condft.tasks.speech.compose import components, compose_audio_llm, encoder_window
from condft.tasks.speech.data import (
    Clip,
    SkippedClip,
    SpeechData,
    SpeechDataError,
    clips_digest,
    describe_skipped,
    load_manifest,
    load_speech_dataset,
    longest_seconds,
    read_audio,
)
from condft.tasks.speech.features import (
    PassThroughTower,
    compute_features,
    default_cache_dir,
    precomputed_features,
    tower_fingerprint,
)

__all__ = [
    "IGNORE_INDEX",
    "Clip",
    "PassThroughTower",
    "SkippedClip",
    "SpeechCollator",
    "SpeechData",
    "SpeechDataError",
    "SpeechExample",
    "clips_digest",
    "components",
    "compose_audio_llm",
    "compute_features",
    "default_cache_dir",
    "describe_skipped",
    "encoder_window",
    "load_manifest",
    "load_speech_dataset",
    "longest_seconds",
    "make_examples",
    "precomputed_features",
    "read_audio",
    "tower_fingerprint",
]
