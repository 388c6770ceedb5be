"""The encoder in NumPy against transformers."""

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration

from scripts.data.whisper_encoder_numpy import encode
from tests.helpers.ctranslate2_files import Arrays


def test_the_numpy_encoder_agrees_with_transformers(model: WhisperForConditionalGeneration, arrays: Arrays) -> None:
    log_mel = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    with torch.inference_mode():
        expected = model.model.encoder(torch.from_numpy(log_mel)[None]).last_hidden_state[0].numpy()
    found = encode(arrays, log_mel)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_numpy_encoder_sees_swapped_queries_and_keys(arrays: Arrays) -> None:
    log_mel = np.random.default_rng(0).standard_normal((6, 20))
    name = "encoder/layer_0/self_attention/linear_0/weight"
    q, k, v = np.split(arrays[name], 3)
    swapped = encode({**arrays, name: np.concatenate([v, k, q])}, log_mel)
    assert np.abs(encode(arrays, log_mel) - swapped).max() > 1e-3
