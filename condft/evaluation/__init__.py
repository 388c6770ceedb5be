"""Evaluation: what was learned (word error rate) beside what was forgotten (cross-entropy, KL to the base)."""

from condft.evaluation.retention import (
    CrossEntropy,
    held_out_text,
    kl_to_base,
    text_cross_entropy,
)
from condft.evaluation.wer import WerReport, normalise, transcribe, word_error_rate
from condft.own_text import sample_from_base

__all__ = [
    "CrossEntropy",
    "WerReport",
    "held_out_text",
    "kl_to_base",
    "normalise",
    "sample_from_base",
    "text_cross_entropy",
    "transcribe",
    "word_error_rate",
]
