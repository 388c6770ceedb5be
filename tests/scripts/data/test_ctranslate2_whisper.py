"""The reader of CTranslate2's Whisper files, against files that an independent writer makes of tiny real models."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperForConditionalGeneration

from scripts.data.ctranslate2_whisper import CTranslate2Error, read_ctranslate2, whisper_config, whisper_state_dict
from scripts.data.whisper_encoder_numpy import encode

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 1}
CODES = {np.dtype("int8"): 1, np.dtype("int16"): 2, np.dtype("float16"): 4}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """A tiny Whisper whose every weight, biases and norms too, is random and exact in fp16."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=37, num_mel_bins=6, d_model=8, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=12, decoder_ffn_dim=20, max_source_positions=10,
        max_target_positions=9, begin_suppress_tokens=None, **TOKEN_IDS,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) / 2).half())
    return model


@pytest.fixture(scope="module")
def arrays(model: WhisperForConditionalGeneration) -> Arrays:
    return ctranslate2_arrays(model)


def ctranslate2_arrays(model: WhisperForConditionalGeneration) -> Arrays:
    """What CTranslate2's own converter would store, written from its specification rather than from the reader."""
    state = {name.removeprefix("model."): value.half().numpy() for name, value in model.state_dict().items()}
    config, out = model.config, {}
    for side, heads in (("encoder", config.encoder_attention_heads), ("decoder", config.decoder_attention_heads)):
        out[f"{side}/num_heads"] = np.int16(heads)
        out[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        _put_norm(out, f"{side}/layer_norm", state, f"{side}.layer_norm")
        for index in range(getattr(config, f"{side}_layers")):
            here, there = f"{side}/layer_{index}", f"{side}.layers.{index}"
            _put_linear(out, f"{here}/self_attention/linear_0", state, f"{there}.self_attn", "qkv")
            _put_linear(out, f"{here}/self_attention/linear_1", state, f"{there}.self_attn", ["out"])
            _put_norm(out, f"{here}/self_attention/layer_norm", state, f"{there}.self_attn_layer_norm")
            if side == "decoder":
                for number, parts in enumerate(("q", "kv", ["out"])):
                    _put_linear(out, f"{here}/attention/linear_{number}", state, f"{there}.encoder_attn", parts)
                _put_norm(out, f"{here}/attention/layer_norm", state, f"{there}.encoder_attn_layer_norm")
            for number, name in enumerate(("fc1", "fc2")):
                for part in ("weight", "bias"):
                    out[f"{here}/ffn/linear_{number}/{part}"] = state[f"{there}.{name}.{part}"]
            _put_norm(out, f"{here}/ffn/layer_norm", state, f"{there}.final_layer_norm")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            out[f"encoder/{conv}/{part}"] = state[f"encoder.{conv}.{part}"]
    out["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    flags = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0}
    return out | {f"decoder/{name}": np.int8(value) for name, value in flags.items()}


def _put_norm(out: Arrays, name: str, state: Arrays, source: str) -> None:
    out[f"{name}/gamma"], out[f"{name}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]


def _put_linear(out: Arrays, name: str, state: Arrays, source: str, parts: str | list[str]) -> None:
    weights = [state[f"{source}.{part}_proj.weight"] for part in parts]
    biases = [state.get(f"{source}.{part}_proj.bias", np.zeros(len(weights[0]), np.float16)) for part in parts]
    out[f"{name}/weight"], out[f"{name}/bias"] = np.concatenate(weights), np.concatenate(biases)


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


def test_numpy_witness_agrees_with_transformers(
    tmp_path: Path, model: WhisperForConditionalGeneration, arrays: Arrays
) -> None:
    log_mel = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    with torch.inference_mode():
        expected = model.model.encoder(torch.from_numpy(log_mel)[None]).last_hidden_state[0].numpy()
    witness = encode(read(tmp_path, as_bytes(arrays)), log_mel)
    assert witness.dtype == np.float64
    np.testing.assert_allclose(witness, expected, atol=2e-5)


def test_numpy_witness_sees_swapped_queries_and_keys(arrays: Arrays) -> None:
    log_mel = np.random.default_rng(0).standard_normal((6, 20))
    name = "encoder/layer_0/self_attention/linear_0/weight"
    q, k, v = np.split(arrays[name], 3)
    swapped = encode({**arrays, name: np.concatenate([v, k, q])}, log_mel)
    assert np.abs(encode(arrays, log_mel) - swapped).max() > 1e-3


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
