"""Folders of random tiny models under the hub names that PEFT's tests ask for.

    python -m peft_suite.stand_ins FOLDER

transformers takes `org/name` for a local folder when one of that name lies in the working directory, so PEFT's tests
run unchanged and offline. Nothing is downloaded: every model is made from its class's config, with random weights of
a seed derived from its name.
"""

import sys
import zlib
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from transformers import PreTrainedModel

_WIDTH = 64  # wide enough for the rank of 20 that LoRA's tests use, in keys and values too
_VOCABULARY = 1024  # above every token id that the tests use
_TEXT = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = _TEXT | {
    "hidden_size": _WIDTH,
    "intermediate_size": 4 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_BERT_LIKE = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 4 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # With the default 0.02 the activations are so small that an adapter's effect stays below the tests' tolerances.
    "initializer_range": 0.1,
}
_OPT = _TEXT | {
    "hidden_size": _WIDTH,
    "word_embed_proj_dim": _WIDTH,
    "ffn_dim": 4 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GPT2 = _TEXT | {"n_embd": _WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 256}
_BART = _TEXT | {
    "d_model": _WIDTH,
    "encoder_ffn_dim": 4 * _WIDTH,
    "decoder_ffn_dim": 4 * _WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.1,
}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": _WIDTH,
    "d_kv": 16,
    "d_ff": 4 * _WIDTH,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

# Hub name -> model class, config options.
STAND_INS: dict[str, tuple[str, dict]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    # Narrow, as the hub's is: test_lora_conversion takes rank 4 for it and wants most of the update within that rank.
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        _LLAMA_LIKE | {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA_LIKE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _LLAMA_LIKE | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA_LIKE),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT_LIKE),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _BERT_LIKE,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _LLAMA_LIKE | {"num_labels": 1},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT_LIKE),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT_LIKE),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        _BERT_LIKE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        _BERT_LIKE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
}

# Hub name of an adapter whose config the tests read.
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"


def build(name: str) -> PreTrainedModel:
    """The random model that stands in for the hub's `name`; the same weights every time."""
    class_name, options = STAND_INS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(zlib.crc32(name.encode()))
    return model_class(model_class.config_class(**options)).eval()


def main(folder: Path) -> None:
    for name in STAND_INS:
        build(name).save_pretrained(folder / name)
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(folder / ADAPTER))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
