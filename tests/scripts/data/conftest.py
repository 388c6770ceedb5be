"""A tiny Whisper and its tensors as CTranslate2 stores them."""

import pytest
from transformers import WhisperForConditionalGeneration

from tests.helpers.ctranslate2_files import Arrays, ctranslate2_arrays, tiny_whisper


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return tiny_whisper()


@pytest.fixture(scope="module")
def arrays(model: WhisperForConditionalGeneration) -> Arrays:
    return ctranslate2_arrays(model)
