"""Turns raw model files into transformers checkpoints, and reads them back to check them (for `get_models.py`)."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from scripts.data.ctranslate2_whisper import read_ctranslate2, whisper_config, whisper_state_dict
from scripts.data.espeak import synthesize
from scripts.data.whisper_encoder_numpy import encode

SAMPLING_RATE = 16_000
PROMPT, ANSWER = "The capital of France is", " Paris"
# Largest |difference| of the fp32 encoder from the fp64 one in NumPy; its outputs reach about 12.
ENCODER_TOLERANCE = 2e-3
# Whisper writes digits for number words, "3-1-4-7-2"; it transcribes this eSpeak speaker best.
SPOKEN, SPOKEN_DIGITS, SPEAKER = "three one four seven two", "3 1 4 7 2", "en-us+edward"


def build_smollm2(raw: Path, target: Path) -> None:
    """SmolLM2 from its GGUF file (4-bit blocks): dequantized once and saved as an ordinary fp32 Llama.

    Args:
        raw: Folder that holds one `.gguf` file.
        target: Existing folder to write the checkpoint into.
    """
    (gguf_file,) = (path.name for path in raw.glob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(raw, gguf_file=gguf_file, dtype=torch.float32)
    # A fresh model, because transformers refuses to save one that it loaded as quantized.
    facts = quantized.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "transformers_version"):
        facts.pop(key, None)
    # GGUF keeps this as fp32; the nearest short decimal is what was meant (9.999999747378752e-06 is 1e-05).
    facts["rms_norm_eps"] = float(str(np.float32(facts["rms_norm_eps"])))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**facts))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=facts["bos_token_id"], eos_token_id=facts["eos_token_id"], pad_token_id=facts["pad_token_id"]
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=gguf_file)
    # GGUF only names its splitting rule ("smollm"): digits one by one, then GPT-2's; transformers reads the latter.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = facts["max_position_embeddings"]
    tokenizer.save_pretrained(target)


def resave_smollm2(raw: Path, target: Path) -> None:
    """Makes the same from the hub's files (bf16 there)."""
    model = AutoModelForCausalLM.from_pretrained(raw, dtype=torch.float32, use_safetensors=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(raw).save_pretrained(target)


def verify_smollm2(folder: Path, raw: Path | None) -> dict[str, Any]:
    """Reads the checkpoint back and lets it continue a prompt.

    Returns:
        The prompt and its greedy continuation.

    Raises:
        ValueError: The continuation is not the known one, or the config still has a quantization_config.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if model.dtype != torch.float32 or hasattr(model.config, "quantization_config"):
        raise ValueError(f"dtype {model.dtype}, expected plain float32 without a quantization_config")
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError("the output head is not tied to the token embedding")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    continuation = tokenizer.decode(output)
    if not continuation.startswith(ANSWER):
        raise ValueError(f"{PROMPT!r} continues with {continuation!r}, expected {ANSWER!r}")
    return {"prompt": PROMPT, "continuation": continuation}


def build_whisper(raw: Path, target: Path) -> None:
    """Whisper, encoder and decoder, from CTranslate2's `model.bin`, `config.json` and `tokenizer.json`.

    Args:
        raw: Folder that holds the three files.
        target: Existing folder to write the checkpoint into.
    """
    tokenizer = WhisperTokenizer.from_pretrained(raw)
    facts = json.loads((raw / "config.json").read_text(encoding="utf-8"))
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    arrays = read_ctranslate2(raw / "model.bin")
    # begin_suppress_tokens moved to the generation config; the class default is the multilingual model's.
    config = whisper_config(arrays, {**ids, "begin_suppress_tokens": None})
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_state_dict(arrays), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        **ids,
        max_length=config.max_target_positions,
        suppress_tokens=facts["suppress_ids"],
        begin_suppress_tokens=facts["suppress_ids_begin"],
        alignment_heads=facts["alignment_heads"],
        is_multilingual=False,  # the .en model knows no language tokens: its prompt is start, no-timestamps
        max_initial_timestamp_index=50,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        return_timestamps=False,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


def resave_whisper(raw: Path, target: Path) -> None:
    """Makes the same from the hub's files."""
    model = WhisperForConditionalGeneration.from_pretrained(raw, dtype=torch.float32, use_safetensors=True)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(raw).save_pretrained(target)
    WhisperFeatureExtractor.from_pretrained(raw).save_pretrained(target)


def verify_whisper(folder: Path, raw: Path | None) -> dict[str, Any]:
    """Reads the checkpoint back and compares its encoder with an independent reading of the raw file.

    Args:
        folder: The checkpoint.
        raw: Folder with the `model.bin` it was made from; None when it came from the hub as it is.

    Returns:
        The largest absolute value of the encoder's output on a test signal, its largest difference from the NumPy
        encoder, and the transcription of a spoken sentence.

    Raises:
        ValueError: The outputs differ, are not finite, the head is not tied, or the transcription is wrong.
    """
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    if model.dtype != torch.float32:
        raise ValueError(f"dtype {model.dtype}, expected float32")
    if model.proj_out.weight is not model.model.decoder.embed_tokens.weight:
        raise ValueError("the output head is not tied to the token embedding")
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    log_mel = extractor(_test_signal(), sampling_rate=SAMPLING_RATE, return_tensors="np").input_features[0]
    with torch.inference_mode():
        output = model.model.encoder(torch.from_numpy(log_mel)[None]).last_hidden_state[0].numpy()
    if not np.isfinite(output).all():
        raise ValueError("the encoder's output is not finite")
    checks: dict[str, Any] = {"encoder_output_max_abs": float(np.abs(output).max())}
    if raw is not None:
        reference = encode(read_ctranslate2(raw / "model.bin"), log_mel)
        checks["encoder_max_abs_difference"] = difference = float(np.abs(output - reference).max())
        if difference > ENCODER_TOLERANCE:
            raise ValueError(f"the encoder differs by {difference:.3g} from NumPy's reading of model.bin")
    checks["transcription"] = hypothesis = _transcribe(model, extractor, AutoTokenizer.from_pretrained(folder))
    if re.findall(r"\d", hypothesis) != re.findall(r"\d", SPOKEN_DIGITS):
        raise ValueError(f"spoken {SPOKEN!r}, transcribed {hypothesis!r}")
    return checks


def _transcribe(
    model: WhisperForConditionalGeneration, extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The transcription of `SPOKEN` by the whole model, decoder and tokenizer included."""
    samples, rate = synthesize(SPOKEN, SPEAKER)
    audio = soxr.resample(samples / np.float32(32768), rate, SAMPLING_RATE)
    features = extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt", return_attention_mask=True)
    with torch.inference_mode():
        output = model.generate(features.input_features, attention_mask=features.attention_mask, max_length=24)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _test_signal() -> np.ndarray:
    """Ten seconds of a rising tone in seeded noise: every mel band gets something, the rest is padding."""
    time = np.arange(10 * SAMPLING_RATE) / SAMPLING_RATE
    noise = np.random.default_rng(0).standard_normal(time.size)
    return (0.3 * np.sin(2 * np.pi * (100 + 350 * time) * time) + 0.02 * noise).astype(np.float32)
