"""Speech: an audio LLM from pre-trained parts, clips with their texts, features, batches, and word error rates.

Needs the extra `speech`: pip install 'condft[speech]'.
"""

from condft.runtime.extras import needs_extra

with needs_extra("speech"):
    from condft.tasks.speech.clips import Clip, SkippedClip, SpeechData, SpeechDataError, read_audio
    from condft.tasks.speech.collate import SpeechCollator, SpeechExample, make_examples
    from condft.tasks.speech.compose import components, compose_audio_llm
    from condft.tasks.speech.data import load_manifest, load_speech_dataset
    from condft.tasks.speech.features import compute_features, precomputed_features
    from condft.tasks.speech.wer import WerReport, normalize, transcribe, word_error_rate

__all__ = [
    "Clip",
    "SkippedClip",
    "SpeechCollator",
    "SpeechData",
    "SpeechDataError",
    "SpeechExample",
    "WerReport",
    "components",
    "compose_audio_llm",
    "compute_features",
    "load_manifest",
    "load_speech_dataset",
    "make_examples",
    "normalize",
    "precomputed_features",
    "read_audio",
    "transcribe",
    "word_error_rate",
]
