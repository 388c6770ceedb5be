"""The reader of CTranslate2's Whisper files, against files that an independent writer makes of tiny real models."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from scripts.data.ctranslate2_whisper import CTranslate2Error, read_ctranslate2, whisper_config, whisper_state_dict
from tests.helpers.ctranslate2_files import CODES, TOKEN_IDS, Arrays


def as_bytes(arrays: Arrays, *, version: int = 6, spec: str = "WhisperSpec", code: int | None = None) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in sorted(arrays.items()):
        parts += [string(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", CODES[array.dtype] if code is None else code, array.nbytes), array.tobytes()]
    alias = string("decoder/projection/weight") + string("decoder/embeddings/weight")
    return b"".join([*parts, struct.pack("<I", 1), alias])


def read(folder: Path, content: bytes) -> Arrays:
    (folder / "model.bin").write_bytes(content)
    return read_ctranslate2(folder / "model.bin")


def test_conversion_gives_back_the_model_bit_for_bit(
    tmp_path: Path, model: WhisperForConditionalGeneration, arrays: Arrays
) -> None:
    there = read(tmp_path, as_bytes(arrays))
    config = whisper_config(there, {**TOKEN_IDS, "begin_suppress_tokens": None})
    assert config.to_diff_dict() == {
        key: value for key, value in model.config.to_diff_dict().items() if key not in ("architectures", "dtype")
    }
    state = whisper_state_dict(there)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert state["proj_out.weight"] is state["model.decoder.embed_tokens.weight"]


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, arrays: Arrays, share: float
) -> None:
    content = as_bytes(arrays)
    with pytest.raises(CTranslate2Error, match=r"ends early: .* bytes wanted at byte"):
        read(tmp_path_factory.mktemp("cut"), content[: int(share * len(content))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: as_bytes(a, version=5), "binary version 5"),
        (lambda a: as_bytes(a, spec="TransformerSpec"), "holds a 'TransformerSpec', not a 'WhisperSpec'"),
        (lambda a: as_bytes(a, code=9), "has dtype code 9"),
        (lambda a: as_bytes(a, code=0), r"needs [\d,]+ bytes, has"),
        (lambda a: as_bytes(a) + b"!", "bytes are left"),
        (lambda a: as_bytes({n: v for n, v in a.items() if n != "decoder/embeddings/weight"}), "is an alias of"),
    ],
    ids=["version", "spec", "unknown-dtype", "wrong-size", "trailing", "dangling-alias"],
)
def test_a_malformed_file_is_named(
    tmp_path: Path, arrays: Arrays, change: Callable[[Arrays], bytes], message: str
) -> None:
    with pytest.raises(CTranslate2Error, match=message):
        read(tmp_path, change(arrays))


def test_a_key_bias_is_refused(arrays: Arrays) -> None:
    name = "decoder/layer_1/attention/linear_1/bias"
    biased = arrays[name].copy()
    biased[3] = 0.25  # the first half is the keys'
    arrays = {**arrays, name: biased, "decoder/projection/weight": arrays["decoder/embeddings/weight"]}
    with pytest.raises(CTranslate2Error, match=r"decoder\.layers\.1\.encoder_attn\.k_proj has a bias \(up to 0\.25\)"):
        whisper_state_dict(arrays)


def test_missing_extra_and_untied_tensors_are_refused(arrays: Arrays) -> None:
    head = arrays["decoder/embeddings/weight"]
    tied = {**arrays, "decoder/projection/weight": head}
    with pytest.raises(CTranslate2Error, match="'encoder/conv2/bias' is missing"):
        whisper_state_dict({n: a for n, a in tied.items() if n != "encoder/conv2/bias"})
    with pytest.raises(CTranslate2Error, match=r"1 tensors have no place .* 'encoder/conv3/bias'"):
        whisper_state_dict({**tied, "encoder/conv3/bias": head})
    with pytest.raises(CTranslate2Error, match="is not the token embedding"):
        whisper_state_dict({**tied, "decoder/projection/weight": head + np.float16(1)})
    with pytest.raises(CTranslate2Error, match="activation is 1, Whisper in transformers has 3"):
        whisper_config({**tied, "decoder/activation": np.int8(1)}, TOKEN_IDS)
