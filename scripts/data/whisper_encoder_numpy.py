"""Whisper's encoder in plain NumPy, straight from CTranslate2's tensors: an independent check of a conversion.

It shares nothing with the conversion or with transformers: neither tensor names, nor convolution, nor attention.
Used by `scripts/data/get_models.py`. Shapes: T frames, S = T/2 positions, D model, H heads, K head width.
"""

import math

import numpy as np

Arrays = dict[str, np.ndarray]
LAYER_NORM_EPSILON = 1e-5
_erf = np.vectorize(math.erf, otypes=[np.float64])


def encode(arrays: Arrays, log_mel: np.ndarray) -> np.ndarray:
    """The encoder's output for one clip, computed in fp64.

    Args:
        arrays: CTranslate2's tensors by name (`read_ctranslate2`), any floating dtype.
        log_mel: `(num_mel_bins, T)` log-mel features.

    Returns:
        `(S, D)` fp64 hidden states after the last layer norm.
    """
    arrays = {n: a.astype(np.float64) for n, a in arrays.items() if n.startswith("encoder/")}
    num_heads = int(arrays["encoder/num_heads"])
    hidden_ct = _gelu(_convolve(arrays, "encoder/conv1", log_mel.astype(np.float64), stride=1))
    hidden_ct = _gelu(_convolve(arrays, "encoder/conv2", hidden_ct, stride=2))
    hidden_sd = hidden_ct.T + arrays["encoder/position_encodings/encodings"][: hidden_ct.shape[1]]
    layer = 0
    while f"encoder/layer_{layer}/ffn/linear_0/weight" in arrays:
        name = f"encoder/layer_{layer}"
        normed_sd = _layer_norm(arrays, f"{name}/self_attention/layer_norm", hidden_sd)
        hidden_sd = hidden_sd + _attend(arrays, f"{name}/self_attention", normed_sd, num_heads)
        normed_sd = _layer_norm(arrays, f"{name}/ffn/layer_norm", hidden_sd)
        inner = _gelu(_linear(arrays, f"{name}/ffn/linear_0", normed_sd))
        hidden_sd = hidden_sd + _linear(arrays, f"{name}/ffn/linear_1", inner)
        layer += 1
    return _layer_norm(arrays, "encoder/layer_norm", hidden_sd)


def _convolve(arrays: Arrays, name: str, signal_ct: np.ndarray, stride: int) -> np.ndarray:
    weight = arrays[f"{name}/weight"]  # (out, in, width)
    width = weight.shape[2]
    padded = np.pad(signal_ct, ((0, 0), (width // 2, width // 2)))
    starts = range(0, padded.shape[1] - width + 1, stride)
    unfolded = np.stack([padded[:, start : start + width].ravel() for start in starts], axis=1)
    return weight.reshape(len(weight), -1) @ unfolded + arrays[f"{name}/bias"][:, None]


def _attend(arrays: Arrays, name: str, hidden_sd: np.ndarray, num_heads: int) -> np.ndarray:
    q_sd, k_sd, v_sd = np.split(_linear(arrays, f"{name}/linear_0", hidden_sd), 3, axis=1)
    width = q_sd.shape[1] // num_heads
    heads = []
    for start in range(0, q_sd.shape[1], width):
        part = slice(start, start + width)
        scores_ss = q_sd[:, part] @ k_sd[:, part].T / math.sqrt(width)
        scores_ss = np.exp(scores_ss - scores_ss.max(axis=1, keepdims=True))
        heads.append(scores_ss @ v_sd[:, part] / scores_ss.sum(axis=1, keepdims=True))
    return _linear(arrays, f"{name}/linear_1", np.concatenate(heads, axis=1))


def _linear(arrays: Arrays, name: str, value: np.ndarray) -> np.ndarray:
    return value @ arrays[f"{name}/weight"].T + arrays[f"{name}/bias"]


def _layer_norm(arrays: Arrays, name: str, value: np.ndarray) -> np.ndarray:
    centered = value - value.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    return centered / scale * arrays[f"{name}/gamma"] + arrays[f"{name}/beta"]


def _gelu(value: np.ndarray) -> np.ndarray:
    return value * 0.5 * (1.0 + _erf(value / math.sqrt(2.0)))
