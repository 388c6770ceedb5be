"""Tiny real checkpoints, tokenizers and clips: everything is made offline and within seconds."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXAMPLE_RUN = """\
output_dir: runs/example
model:
  language_model: llama
  audio_tower: whisper
data:
  manifest: clips/manifest.jsonl
training:
  projector_steps: 1
  steps: 2
  per_device_batch_size: 2
  mixed_precision: no
"""
WORDS = ["zero", "one", "two", "three", "four", "null", "eins", "zwei", "drei", "vier"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without merges: 256 bytes and the ChatML markers; any text survives the round trip."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


def save_language_model(folder: Path, *, tied: bool = True, spare_rows: int = 0) -> str:
    """A random Llama with the tokenizer's vocabulary, `spare_rows` more embedding rows than tokens."""
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_whisper(folder: Path) -> str:
    """A random Whisper with a window of 30 s, as all of them have."""
    torch.manual_seed(2)
    config = WhisperConfig(
        vocab_size=60,
        num_mel_bins=80,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_source_positions=1500,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)


def write_clip(path: Path, seconds: float, *, sampling_rate: int = 16000, channels: int = 1, seed: int = 0) -> Path:
    """A chirp with a little noise, different for every seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 90 * seed + 300 * time) * time)
    wave = wave + 0.01 * generator.standard_normal(len(time))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), sampling_rate)
    return path


def write_manifest(folder: Path, seconds: list[float], *, num_test: int = 1) -> Path:
    """A manifest of `len(seconds)` FLAC clips, the last `num_test` of them in the test split."""
    lines = []
    for index, length in enumerate(seconds):
        write_clip(folder / "audio" / f"{index}.flac", length, seed=index)
        line = {"audio": f"audio/{index}.flac", "text": " ".join(WORDS[index % 9 : index % 9 + 2])}
        line |= {"language": "en" if index % 2 == 0 else "de", "speaker": f"speaker-{index}"}
        lines.append(line | {"split": "test" if index >= len(seconds) - num_test else "train"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_lines(folder: Path, *lines: object) -> Path:
    """A manifest of these lines: objects become JSON, strings are written as they are."""
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def fill_example_folder(folder: Path) -> None:
    """What examples of speech and training start from.

    Writes `whisper` and `llama` (random weights), `clips/manifest.jsonl` (3 + 1 clips) and `run.yaml`.
    """
    save_whisper(folder / "whisper")
    save_language_model(folder / "llama")
    write_manifest(folder / "clips", [0.4, 1.5, 0.9, 0.66])
    (folder / "run.yaml").write_text(EXAMPLE_RUN, encoding="utf-8")
