"""Tiny Whisper models, and their tensors as CTranslate2 would store them."""

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 1}
CODES = {np.dtype("int8"): 1, np.dtype("int16"): 2, np.dtype("float16"): 4}
Arrays = dict[str, np.ndarray]


def tiny_whisper() -> WhisperForConditionalGeneration:
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
